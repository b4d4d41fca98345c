"""Give each request thresholds of its own, or turn compression off for it.

    .venv/bin/python examples/per_request.py

The same over HTTP, with the server of serve.sh, which has --drops too:

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{
        "model": "reference", "prompt": "<bos> k1 v2 ; k3 v4 ; ? k3", "max_tokens": 2,
        "temperature": 0, "vllm_xargs": {"diffkv_alpha_high": 6, "diffkv_alpha_low": 0.5}}'
"""

import json
import os
from importlib.resources import files

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from diffkv.vllm_plugin import engine_args

DATA = files("diffkv") / "data"
SETTINGS = (
    {},  # the engine's thresholds
    {"diffkv": "off"},  # every token stays high
    {"diffkv_alpha_high": 2},  # more tokens stay high
    {"diffkv_alpha_low": 0.2},  # tokens that get little attention are dropped
)


def main() -> None:
    row = json.loads((DATA / "prompts.jsonl").read_text().splitlines()[0])
    llm = LLM(
        str(DATA / "reference"),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        # With drops, requests may set alpha_low.
        **engine_args(drops=True),
    )
    before = {"num_tokens": 0, "high": 0.0, "low": 0.0, "num_bytes": 0}
    for settings in SETTINGS:  # one after the other, only to count each one's bytes
        params = SamplingParams(
            temperature=0, max_tokens=len(row["answer"].split()), extra_args=settings
        )
        (output,) = llm.generate([row["prompt"]], params, use_tqdm=False)
        totals = llm.collective_rpc("diffkv_summary")[0]["totals"]
        tokens, high, low, num_bytes = (totals[name] - before[name] for name in before)
        before = {name: totals[name] for name in before}
        print(
            f"{settings}: {output.outputs[0].text.strip()} "
            f"({high / tokens:.0%} high, {low / tokens:.0%} low, "
            f"{max(0, 1 - (high + low) / tokens):.0%} dropped, {num_bytes / tokens:.0f} B a token)"
        )
    try:
        llm.generate(
            [row["prompt"]], SamplingParams(extra_args={"diffkv_alpha_high": -1}), use_tqdm=False
        )
    except VLLMValidationError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
