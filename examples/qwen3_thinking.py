"""A thinking model: long sampled answers, where the cache is mostly generated tokens.

Run it as `.venv/bin/python examples/qwen3_thinking.py --model FOLDER_OR_ID`.

Formats are the artifact's for thinking models: finer groups for 4 and 2 bits. Nothing is dropped; the
thresholds are those published for QwQ-32B, since there are none for Qwen 3. Greedy decoding makes these
models repeat themselves, so their authors ask for temperature 0.6, top_p 0.95 and top_k 20.
"""

import argparse
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams

from diffkv.vllm_plugin import engine_args

QUESTION = (
    "How many positive integers below 1000 have digits that add up to 10? "
    "Please reason step by step, and put your final answer within \\boxed{}."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-8B-AWQ")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=4)
    args = parser.parse_args()

    llm = LLM(
        args.model,
        enforce_eager=True,
        **engine_args("k8v4g1x2-k4v2g2x4", alpha_high=3.0, alpha_low=0.0),
    )
    params = SamplingParams(
        temperature=0.6, top_p=0.95, top_k=20, max_tokens=args.max_tokens, n=args.samples, seed=0
    )
    (output,) = llm.chat([{"role": "user", "content": QUESTION}], params, use_tqdm=False)
    for number, sample in enumerate(output.outputs, 1):
        thoughts, ended, answer = sample.text.partition("</think>")
        print(
            f"-- sample {number}: {len(sample.token_ids)} tokens, {len(thoughts)} characters of "
            f"thoughts, ended by {sample.finish_reason}\n"
            f"{answer.strip() if ended else 'no answer yet: raise --max-tokens'}\n"
        )

    (summary,) = llm.collective_rpc("diffkv_summary")  # of each worker, here one
    totals, bf16 = summary["totals"], summary["pool"]["bf16_bytes_per_token"]
    per_token = totals["num_bytes"] / totals["num_tokens"]
    print(
        f"{totals['num_tokens']} tokens: {totals['high']:.0f} high, {totals['low']:.0f} low (means "
        f"over heads); {per_token:.0f} bytes a token, bf16 {bf16}: {bf16 / per_token:.2f} times smaller"
    )


if __name__ == "__main__":
    main()
