"""Answer the bundled prompts with a compressed cache, from Python, and print its cost.

Run: .venv/bin/python examples/offline.py
"""

import json
import os
from importlib.resources import files

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams

from diffkv.vllm_plugin import engine_args

DATA = files("diffkv") / "data"


def main() -> None:
    rows = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
    llm = LLM(
        str(DATA / "reference"),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        **engine_args(),
    )
    params = [SamplingParams(temperature=0, max_tokens=len(r["answer"].split())) for r in rows]
    outputs = llm.generate([row["prompt"] for row in rows], params, use_tqdm=False)
    for row, output in zip(rows, outputs, strict=True):
        answer = output.outputs[0].text.strip()
        verdict = "right" if answer == row["answer"] else f"wrong, should be {row['answer']}"
        print(f"{row['name']}: {answer} ({verdict})")

    (summary,) = llm.collective_rpc("diffkv_summary")  # one per worker
    totals, bf16 = summary["totals"], summary["pool"]["bf16_bytes_per_token"]
    per_token = totals["num_bytes"] / totals["num_tokens"]
    print(
        f"{totals['num_tokens']} tokens: {totals['high']:.0f} high, {totals['low']:.0f} low "
        f"(mean over heads), {per_token:.0f} bytes a token, bf16 {bf16}: "
        f"{bf16 / per_token:.2f} times smaller"
    )


if __name__ == "__main__":
    main()
