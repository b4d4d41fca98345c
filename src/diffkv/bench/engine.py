"""One offline run in a process of its own: `python -m diffkv.bench.engine` reads a job, prints a result.

The parent (`throughput`) starts one for every setting and repeat, so that no run inherits another's
memory, threads or compiled code. It stands between vLLM and the figures: it drives the engine step by
step and notes what each step was made of.
"""

import cProfile
import json
import os
import pstats
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from diffkv.quant import ConfigError

__all__ = ["Job", "main"]

KIB = 1 << 10
PROFILE_ROWS = 30

CELL_SECONDS = 4.0
CELL_RUNS = 5
"""A cell that is over sooner runs again, at most so many times in all; its figures are medians."""


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        engine: arguments of vLLM's engine.
        options: DiffKV's; None for vLLM's own cache.
        prompts: token ids.
        max_tokens: to generate, for each prompt.
        kv_bytes: of the cache.
        profile: print where the time goes (Python's profiler) to standard error.
        cells: in place of prompts and max_tokens, several pairs of them, which run one after the other
            in the same engine.
    """

    engine: dict[str, Any]
    options: dict[str, Any] | None
    prompts: list[list[int]]
    max_tokens: list[int]
    kv_bytes: int
    profile: bool = False
    cells: Sequence[tuple[list[list[int]], list[int]]] = ()


@dataclass
class _Steps:
    """Sums over the steps of a run."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    max_running: int = 0
    peak: tuple[int, int] = (0, 1)
    tokens: tuple[int, int] = field(default=(0, 0))


def _scheduled(scheduler: Any, output: Any) -> tuple[int, int]:
    """Prompt tokens (those of resumed requests too) and generated tokens of a step."""
    prompt = generated = 0
    for name, count in output.num_scheduled_tokens.items():
        request = scheduler.requests[name]
        if request.num_computed_tokens - count + 1 < request.num_tokens:
            prompt += count
        else:
            generated += count
    return prompt, generated


def _drive(llm: Any, job: Job) -> tuple[_Steps, float]:
    """Run all requests to their end; the sums, and the seconds it took."""
    from vllm import SamplingParams

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    steps, schedule, profiles = _Steps(), scheduler.schedule, _Profiles(job.profile)

    def noting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        steps.tokens = _scheduled(scheduler, output)
        profiles.start("prefill" if steps.tokens[0] else "decode")
        return output

    scheduler.schedule = noting
    for index, (prompt, count) in enumerate(zip(job.prompts, job.max_tokens, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    pool = scheduler.kv_cache_manager.block_pool
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        start, steps.tokens = time.perf_counter(), (0, 0)
        llm.llm_engine.step()
        profiles.stop()
        elapsed = time.perf_counter() - start
        prompt_tokens, new_tokens = steps.tokens
        if prompt_tokens:
            steps.prefill_seconds += elapsed
            steps.prefill_tokens += prompt_tokens
        else:
            steps.decode_seconds += elapsed
            steps.decode_tokens += new_tokens
            steps.decode_steps += 1
        steps.max_running = max(steps.max_running, len(scheduler.running))
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        covered = sum(request.num_computed_tokens for request in scheduler.running)
        if covered > steps.peak[1]:
            steps.peak = held, covered
    seconds = time.perf_counter() - begin
    profiles.show()
    scheduler.schedule = schedule
    return steps, seconds


def _peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


class _Profiles:
    """Where the time goes, of steps with prompt tokens in them and of steps without, apart."""

    def __init__(self, wanted: bool) -> None:
        names = ("prefill", "decode") if wanted else ()
        self._of_kind = {name: cProfile.Profile() for name in names}
        self._running: cProfile.Profile | None = None

    def start(self, kind: str) -> None:
        """Begin a step of a kind, if profiles are wanted."""
        self._running = self._of_kind.get(kind)
        if self._running is not None:
            self._running.enable()

    def stop(self) -> None:
        """End the step."""
        if self._running is not None:
            self._running.disable()
            self._running = None

    def show(self) -> None:
        """Print both to standard error, what took longest first."""
        for name, profile in self._of_kind.items():
            print(f"{name} steps:", file=sys.stderr)
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(PROFILE_ROWS)


def run(job: Job) -> dict[str, Any]:
    """Start an engine, warm it up with one short request, run the job, and count.

    Returns:
        Figures; of a job with cells a list of them as `cells`.
    """
    from diffkv.vllm_plugin import engine_args, offline

    ours = {} if job.options is None else engine_args(**job.options)
    arguments = {
        "enforce_eager": True, "disable_log_stats": False, "enable_prefix_caching": False,
        "kv_cache_memory_bytes": job.kv_bytes, **ours, **job.engine,
    }  # fmt: skip
    cells = [replace(job, prompts=each, max_tokens=counts) for each, counts in job.cells]
    warm = cells[0] if cells else job
    with offline.engine(arguments) as llm:
        _drive(llm, Job({}, None, [warm.prompts[0][:64]], [4], job.kv_bytes))
        if cells:
            return {"cells": [_cell(llm, cell) for cell in cells]}
        return _measured(llm, job)


def _cell(llm: Any, job: Job) -> dict[str, Any]:
    """Medians of as many runs as a short cell takes to be measured."""
    runs: list[dict[str, Any]] = []
    while len(runs) < CELL_RUNS and sum(run["seconds"] for run in runs) < CELL_SECONDS:
        runs.append(_measured(llm, job))
    return {"runs": len(runs), **{name: median(run[name] for run in runs) for name in runs[0]}}


def _totals(llm: Any, job: Job) -> dict[str, float]:
    """What only grows: preemptions, and with DiffKV what its requests have spent so far."""
    preemptions = sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )
    ours = {} if job.options is None else llm.collective_rpc("diffkv_summary")[0]["totals"]
    return {"preemptions": preemptions, **ours}


def _measured(llm: Any, job: Job) -> dict[str, Any]:
    """Run a job's prompts in an engine that is warm, and count."""
    from vllm.platforms import current_platform

    before = _totals(llm, job)
    steps, seconds = _drive(llm, job)
    spent = {name: value - before[name] for name, value in _totals(llm, job).items()}
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    held, covered = steps.peak
    result: dict[str, Any] = {
        "bytes_per_token": held * job.kv_bytes / pool.num_gpu_blocks / covered
    }
    if job.options is not None:
        kept = spent["num_tokens"]
        result = {
            "bytes_per_token": spent["num_bytes"] / kept,
            "high_share": spent["high"] / kept, "low_share": spent["low"] / kept,
        }  # fmt: skip
    return {
        **result,
        "seconds": seconds,
        "tokens_per_s": sum(job.max_tokens) / seconds,
        "decode_tokens_per_s": steps.decode_tokens / max(steps.decode_seconds, 1e-9),
        "prefill_tokens_per_s": steps.prefill_tokens / max(steps.prefill_seconds, 1e-9),
        "ms_per_decode_step": steps.decode_seconds / max(steps.decode_steps, 1) * 1e3,
        "running_per_decode_step": steps.decode_tokens / max(steps.decode_steps, 1),
        "max_running": steps.max_running,
        "preemptions": int(spent["preemptions"]),
        "peak_memory_bytes": _peak_memory(current_platform.device_type),
    }


def main() -> int:
    """Read a job from standard input; the last line of standard output is the result."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    job = Job(**json.load(sys.stdin))
    try:
        result = run(job)
    except ConfigError as error:
        result = {"error": str(error)}
    print("\n" + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
