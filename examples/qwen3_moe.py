"""A mixture of experts in AWQ int4, its heads split over two devices.

Run it as `.venv/bin/python examples/qwen3_moe.py --model FOLDER_OR_ID`.

On a CPU, VLLM_CPU_OMP_THREADS_BIND='0|1' gives each of the two processes a core, and vLLM has no AWQ
kernel for experts: take a model in bfloat16 there. Thresholds as in qwen3_thinking.py.
"""

import argparse
import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams

from diffkv.vllm_plugin import engine_args

QUESTIONS = (
    "Write a Python function that tells whether a string is a palindrome.",
    "Explain in one paragraph how a hash table deals with collisions.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="QuixiAI/Qwen3-30B-A3B-AWQ")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    args = parser.parse_args()

    llm = LLM(
        args.model,
        enforce_eager=True,
        tensor_parallel_size=args.tensor_parallel_size,
        **engine_args("k8v4-k4v2", alpha_high=3.0, alpha_low=0.0),
    )
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = SamplingParams(
        temperature=0.6, top_p=0.95, top_k=20, max_tokens=args.max_tokens, seed=0
    )
    for question, output in zip(QUESTIONS, llm.chat(chats, params, use_tqdm=False), strict=True):
        print(f"{question}\n{output.outputs[0].text.strip()}\n")

    for rank, summary in enumerate(llm.collective_rpc("diffkv_summary")):
        totals, pool = summary["totals"], summary["pool"]
        per_token = totals["num_bytes"] / totals["num_tokens"]
        print(
            f"rank {rank}: {totals['high']:.0f} of {totals['num_tokens']} tokens high (mean over its "
            f"heads), {per_token:.0f} bytes a token, bf16 {pool['bf16_bytes_per_token']}"
        )


if __name__ == "__main__":
    main()
