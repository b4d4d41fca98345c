"""Llama 3 with the thresholds published for it: some tokens low, some dropped.

Run it as `.venv/bin/python examples/llama3.py --model FOLDER_OR_ID`.
"""

import argparse
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams

from diffkv.vllm_plugin import engine_args

QUESTIONS = (
    "Why is the sky blue? Answer in three sentences.",
    "Name five rivers of Europe and the seas that they flow into.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="meta-llama/Meta-Llama-3-8B-Instruct")
    parser.add_argument("--max-tokens", type=int, default=512)
    args = parser.parse_args()

    llm = LLM(
        args.model,
        enforce_eager=True,
        **engine_args("k8v4-k4v2", alpha_high=1.0, alpha_low=0.02),
    )
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    for question, output in zip(QUESTIONS, llm.chat(chats, params, use_tqdm=False), strict=True):
        print(f"{question}\n{output.outputs[0].text.strip()}\n")

    (summary,) = llm.collective_rpc("diffkv_summary")  # of each worker, here one
    totals, bf16 = summary["totals"], summary["pool"]["bf16_bytes_per_token"]
    dropped = totals["num_tokens"] - totals["high"] - totals["low"]
    print(
        f"{totals['num_tokens']} tokens: {totals['high']:.0f} high, {totals['low']:.0f} low, "
        f"{dropped:.0f} dropped (means over heads); "
        f"{totals['num_bytes'] / totals['num_tokens']:.0f} bytes a token, bf16 {bf16}"
    )


if __name__ == "__main__":
    main()
