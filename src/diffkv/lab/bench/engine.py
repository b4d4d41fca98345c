"""An engine in a process of its own: `python -m diffkv.lab.bench.engine` reads a job and runs cells.

`child` starts one for every setting, so that none inherits another's memory, threads or compiled code.
It stands between vLLM and the figures: it drives the engine step by step and notes what each step was
made of.
"""

import cProfile
import json
import os
import pstats
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffkv.quant import ConfigError

__all__ = ["ANSWER", "Job", "Load", "main"]

KIB = 1 << 10
PROFILE_ROWS = 30

ANSWER = "diffkv-bench: "
"""How a line of standard output begins that is meant for the parent; libraries print there too."""

SHARE_NEEDED = 0.1
"""Share of a GPU's memory that must be free before an engine starts."""

WARM_PROMPTS = 4
WARM_TOKENS = 4


Load = tuple[list[list[int]], list[int]]
"""Prompts in token ids, all there at the start, and how many tokens to generate for each."""


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        engine: arguments of vLLM's engine.
        options: DiffKV's; None for vLLM's own cache.
        kv_bytes: bytes of the cache.
        cells: loads that the engine may be told to run.
        profile: print where the time goes (Python's profiler) to standard error.
    """

    engine: dict[str, Any]
    options: dict[str, Any] | None
    kv_bytes: int
    cells: Sequence[Load]
    profile: bool = False


@dataclass
class _Steps:
    """Sums over the steps of a run.

    Where vLLM runs ahead of the device, a step's time is that from the end of the one before it.
    """

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    max_running: int = 0
    peak: tuple[int, int] = (0, 1)
    begin: float = field(default_factory=time.perf_counter)
    last_end: float = field(default_factory=time.perf_counter)

    def ended(self, prompt_tokens: int, new_tokens: int) -> None:
        """Count a step that has just ended, by what was in it."""
        end = time.perf_counter()
        elapsed, self.last_end = end - self.last_end, end
        if prompt_tokens:
            self.prefill_seconds += elapsed
            self.prefill_tokens += prompt_tokens
        elif new_tokens:
            self.decode_seconds += elapsed
            self.decode_tokens += new_tokens
            self.decode_steps += 1

    def look(self, scheduler: Any) -> None:
        """Note how many requests run, and what blocks they hold."""
        pool = scheduler.kv_cache_manager.block_pool
        self.max_running = max(self.max_running, len(scheduler.running))
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        covered = sum(request.num_computed_tokens for request in scheduler.running)
        if covered > self.peak[1]:
            self.peak = held, covered


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


def _drive(llm: Any, load: Load, profile: bool = False) -> tuple[_Steps, float]:
    """Run all requests of a load to their end; the sums, and the seconds it took."""
    from vllm import SamplingParams

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, update, profiles = (
        scheduler.schedule,
        scheduler.update_from_output,
        _Profiles(profile),
    )
    made_of: dict[int, tuple[int, int]] = {}

    def scheduling(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        made_of[id(output)] = tokens = _scheduled(scheduler, output)
        profiles.start("prefill" if tokens[0] else "decode")
        return output

    def updating(output: Any, *args: Any, **kwargs: Any) -> Any:
        # A step that was under way when this run began is none of it, and no time is its own
        if tokens := made_of.pop(id(output), None):
            steps.ended(*tokens)
        return update(output, *args, **kwargs)

    scheduler.schedule, scheduler.update_from_output = scheduling, updating
    for index, (prompt, count) in enumerate(zip(*load, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    steps = _Steps()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        profiles.stop()
        steps.look(scheduler)
    seconds = time.perf_counter() - steps.begin
    profiles.show()
    scheduler.schedule, scheduler.update_from_output = schedule, update
    return steps, seconds


def _peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


class _Profiles:
    """Where the time goes, of steps with prompt tokens in them and of steps without, apart.

    On a GPU by torch's profiler, since there the time of a Python call says little.
    """

    def __init__(self, wanted: bool) -> None:
        make = _DeviceProfile if torch.cuda.is_available() else cProfile.Profile
        self._of_kind = {name: make() for name in ("prefill", "decode") if wanted}
        self._running: Any = None

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
            if isinstance(profile, cProfile.Profile):
                stats = pstats.Stats(profile, stream=sys.stderr)
                stats.sort_stats("tottime").print_stats(PROFILE_ROWS)
            else:
                print(profile.table(), file=sys.stderr)


class _DeviceProfile:
    """Kernels of some steps of one kind: the first few after the batch has grown."""

    STEPS = range(3, 6)

    def __init__(self) -> None:
        self._seen = 0
        self._profile: Any = None
        self._tables: list[str] = []

    def enable(self) -> None:
        """Begin a step."""
        if self._seen in self.STEPS:
            kinds = torch.profiler.ProfilerActivity
            self._profile = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])
            self._profile.start()
        self._seen += 1

    def disable(self) -> None:
        """End it."""
        if self._profile is not None:
            torch.cuda.synchronize()
            self._profile.stop()
            events = self._profile.key_averages()
            self._tables.append(events.table("self_device_time_total", row_limit=PROFILE_ROWS))
            self._profile = None

    def table(self) -> str:
        """Table of the last step that was looked at."""
        return self._tables[-1] if self._tables else "too few steps"


def serve(job: Job, wanted: Iterable[str]) -> None:
    """Start an engine, warm it up with some requests, then run the cells whose numbers come, and answer.

    CPUs run in eager mode, GPUs as vLLM's defaults say, with compiled code and graphs. vLLM's check that
    a GPU is empty at start is off: the cache has its bytes, and other engines may hold the rest.
    """
    from vllm.platforms import current_platform

    from diffkv.vllm_plugin import engine_args
    from diffkv.vllm_plugin.front import offline

    ours = {} if job.options is None else engine_args(**job.options)
    on_cpu = current_platform.device_type == "cpu"
    arguments = {
        "enforce_eager": on_cpu,
        **({} if on_cpu else {"gpu_memory_utilization": SHARE_NEEDED}),
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": job.kv_bytes,
        **ours,
        **job.engine,
    }
    prompts, _ = job.cells[0]
    warm = [prompts[0][:64]] if on_cpu else prompts[:WARM_PROMPTS]
    with offline.engine(arguments) as llm:
        _drive(llm, (warm, [WARM_TOKENS] * len(warm)))
        _answer({})
        for number in wanted:
            _answer(_measured(llm, job, job.cells[int(number)]))


def _answer(result: dict[str, Any]) -> None:
    print(f"\n{ANSWER}{json.dumps(result)}", flush=True)


def _totals(llm: Any, job: Job) -> dict[str, float]:
    """What only grows: preemptions, and with DiffKV what its requests have spent so far."""
    preemptions = sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )
    ours = {} if job.options is None else llm.collective_rpc("diffkv_summary")[0]["totals"]
    return {"preemptions": preemptions, **ours}


def _measured(llm: Any, job: Job, load: Load) -> dict[str, Any]:
    """Run a load in an engine that is warm, and count."""
    from vllm.platforms import current_platform

    before = _totals(llm, job)
    steps, seconds = _drive(llm, load, job.profile)
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
            "high_share": spent["high"] / kept,
            "low_share": spent["low"] / kept,
        }
    return {
        **result,
        "seconds": seconds,
        "tokens_per_s": sum(load[1]) / seconds,
        "decode_tokens_per_s": steps.decode_tokens / max(steps.decode_seconds, 1e-9),
        "prefill_tokens_per_s": steps.prefill_tokens / max(steps.prefill_seconds, 1e-9),
        "ms_per_decode_step": steps.decode_seconds / max(steps.decode_steps, 1) * 1e3,
        "running_per_decode_step": steps.decode_tokens / max(steps.decode_steps, 1),
        "max_running": steps.max_running,
        "preemptions": int(spent["preemptions"]),
        "peak_memory_bytes": _peak_memory(current_platform.device_type),
    }


def main() -> int:
    """Read a job, and after it the numbers of its cells, from standard input, a line each."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    job = Job(**json.loads(sys.stdin.readline()))
    try:
        serve(job, sys.stdin)
    except ConfigError as error:
        _answer({"error": str(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
