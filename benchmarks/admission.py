"""Requests at once and preemptions, with prompts admitted by their worst case and by expected size.

Long prompts wait for a pool of a few of them, in one process. Engines of both kinds run in turn.
Prints a table; each figure is of one run, the time the median of `--repeats`.

    python benchmarks/admission.py
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from vllm import SamplingParams

from diffkv.cli.engine_options import REFERENCE, model_folder
from diffkv.vllm_plugin import engine_args, offline
from diffkv.vllm_plugin.options import ADMISSIONS


@dataclass(frozen=True)
class Result:
    """What a run was like."""

    at_once: float
    most_at_once: int
    preemptions: float
    given_up: int
    steps: int
    seconds: float


def make_prompts(num: int, length: int) -> list[list[int]]:
    """Prompts of about `length` random tokens of the shipped model."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(length * 7 // 8, length + 1, num)
    return [[1, *rng.integers(10, 400, n - 1).tolist()] for n in lengths]


def count(llm: Any, name: str) -> float:
    """One of vLLM's counters."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def run(admission: str, prompts: list[list[int]], args: argparse.Namespace) -> Result:
    """Answer all prompts, after some that teach the engine their sizes."""
    options = {"alpha_high": args.alpha_high, "alpha_low": args.alpha_low, "admission": admission}
    arguments = {
        "model": model_folder(REFERENCE), "dtype": "bfloat16", "enforce_eager": True,
        "max_model_len": args.length + args.new_tokens, "max_num_seqs": 64,
        "max_num_batched_tokens": args.length, "kv_cache_memory_bytes": args.kv_memory,
        "disable_log_stats": False, **engine_args(args.quant, **options),
    }  # fmt: skip
    with offline.engine(arguments) as llm:
        engine = llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
        teachers = [{"prompt_token_ids": p} for p in prompts[:8]]
        llm.generate(
            teachers, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False
        )
        before = count(llm, "vllm:num_preemptions")
        for i, prompt in enumerate(prompts):
            engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, params)
        scheduler = engine.engine_core.engine_core.scheduler
        running = []
        start = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
            running.append(len(scheduler.running))
        seconds = time.perf_counter() - start
        preemptions = count(llm, "vllm:num_preemptions") - before
        (summary,) = llm.collective_rpc("diffkv_summary")
    return Result(
        statistics.mean(running), max(running), preemptions, summary["totals"]["given_up"],
        len(running), seconds,
    )  # fmt: skip


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quant", default="k8v4-k4v2")
    parser.add_argument("--alpha-high", type=float, default=3)
    parser.add_argument("--alpha-low", type=float, default=1)
    parser.add_argument("--length", type=int, default=1900, help="tokens of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--num", type=int, default=48, help="prompts")
    parser.add_argument("--kv-memory", type=int, default=4 << 20, help="bytes")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    prompts = make_prompts(args.num, args.length)
    results: dict[str, list[Result]] = {admission: [] for admission in ADMISSIONS}
    for _ in range(args.repeats):
        for admission, runs in results.items():
            runs.append(run(admission, prompts, args))
    print("| admission | requests at once, mean | most | preemptions | given up | steps | s |")
    print("|---|---|---|---|---|---|---|")
    for admission, runs in results.items():
        one, seconds = runs[0], statistics.median(r.seconds for r in runs)
        print(
            f"| {admission} | {one.at_once:.1f} | {one.most_at_once} | {one.preemptions:.0f} | "
            f"{one.given_up} | {one.steps} | {seconds:.1f} |"
        )


if __name__ == "__main__":
    main()
