"""Qwen 2.5 7B with the thresholds published for it, beside the same engine with nothing compressed.

Run it as `.venv/bin/python examples/qwen2_5.py --model FOLDER_OR_ID`.

Both thresholds are equal, so prompts have no low tier: a token is high or dropped.
"""

import argparse
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams

from diffkv.vllm_plugin import engine_args

QUESTION = (
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Think step by step."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--max-tokens", type=int, default=512)
    args = parser.parse_args()

    llm = LLM(
        args.model,
        enforce_eager=True,
        **engine_args("k8v4-k4v2", alpha_high=0.04, alpha_low=0.04),
    )
    chat = [{"role": "user", "content": QUESTION}]
    settings = {"compressed": {}, "all tokens high": {"diffkv": "off"}}
    params = [
        SamplingParams(temperature=0, max_tokens=args.max_tokens, extra_args=each)
        for each in settings.values()
    ]
    outputs = llm.chat([chat] * len(params), params, use_tqdm=False)
    for name, output in zip(settings, outputs, strict=True):
        print(f"-- {name}\n{output.outputs[0].text.strip()}\n")


if __name__ == "__main__":
    main()
