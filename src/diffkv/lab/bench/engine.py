"""An engine in a process of its own: `python -m diffkv.lab.bench.engine` reads a job and runs cells.

`child` starts one for every setting, so that none inherits another's memory, threads or compiled code.
It stands between vLLM and the figures: it drives the engine step by step and notes what each step was
made of.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffkv.lab.bench.conversation import Conversation, by_turn
from diffkv.lab.bench.profiles import Profiles
from diffkv.quant import ConfigError

__all__ = ["ANSWER", "Job", "Load", "main"]

KIB = 1 << 10

ANSWER = "diffkv-bench: "
"""How a line of standard output begins that is meant for the parent; libraries print there too."""

SHARE_NEEDED = 0.1
"""Share of a GPU's memory that must be free before an engine starts."""

WARM_PROMPTS = 4
WARM_TOKENS = 4


Load = tuple[list[list[list[int]]], list[int]]
"""Conversations that all begin at once, and how many tokens to generate in each of their turns.

A conversation is the token ids that each turn adds to those before it; a prompt alone is one turn.
"""


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        engine: arguments of vLLM's engine.
        options: DiffKV's; None for vLLM's own cache.
        kv_bytes: bytes of the cache.
        cells: loads that the engine may be told to run.
        profile: print where the time goes (Python's profiler) to standard error.
        turns: say of each turn when first tokens came, and what the prefix cache knew.
        answers: tell the tokens that were generated.
    """

    engine: dict[str, Any]
    options: dict[str, Any] | None
    kv_bytes: int
    cells: Sequence[Load]
    profile: bool = False
    turns: bool = False
    answers: bool = False


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


def _drive(
    llm: Any, load: Load, streams: bool = False, profile: bool = False
) -> tuple[_Steps, float, list[Conversation]]:
    """Run all conversations of a load to their end; the sums, the seconds it took, and what was said.

    Where answers are not streamed they come when they are complete, as from `LLM.generate`.
    """
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    schedule, update, profiles = (
        scheduler.schedule,
        scheduler.update_from_output,
        Profiles(profile),
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
    conversations = [Conversation(turns, count) for turns, count in zip(*load, strict=True)]
    for number, each in enumerate(conversations):
        _ask(engine, number, each, streams)
    steps = _Steps()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        profiles.stop()
        steps.look(scheduler)
        _hear(engine, conversations, outputs, streams)
    seconds = time.perf_counter() - steps.begin
    profiles.show()
    scheduler.schedule, scheduler.update_from_output = schedule, update
    return steps, seconds, conversations


def _ask(engine: Any, number: int, conversation: Conversation, streams: bool) -> None:
    """Give the engine a conversation's next turn."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=conversation.max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY,
    )
    prompt = {"prompt_token_ids": conversation.ask(time.perf_counter())}
    engine.add_request(f"{number}-{len(conversation.answers)}", prompt, params)


def _hear(
    engine: Any, conversations: Sequence[Conversation], outputs: Sequence[Any], streams: bool
) -> None:
    """Pass on what a step generated; a conversation that waits for nothing goes on at once."""
    now = time.perf_counter()
    for output in outputs:
        number = int(output.request_id.partition("-")[0])
        mine, tokens = conversations[number], output.outputs[0].token_ids
        mine.hear(tokens, output.finished, output.num_cached_tokens or 0, now)
        if output.finished and not mine.is_over:
            _ask(engine, number, mine, streams)


def _peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


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
    prompts = [turns[0] for turns in job.cells[0][0]]
    warm = [prompts[0][:64]] if on_cpu else prompts[:WARM_PROMPTS]
    with offline.engine(arguments) as llm:
        _drive(llm, ([[prompt] for prompt in warm], [WARM_TOKENS] * len(warm)))
        _answer({})
        for number in wanted:
            _answer(_measured(llm, job, job.cells[int(number)]))


def _answer(result: dict[str, Any]) -> None:
    print(f"\n{ANSWER}{json.dumps(result)}", flush=True)


COUNTERS = {
    "vllm:num_preemptions": "preemptions",
    "vllm:prefix_cache_queries": "asked",
    "vllm:prefix_cache_hits": "hits",
    "vllm:external_prefix_cache_hits": "hits",  # those that a KV connector knows of
}
"""vLLM's counters of a run, and what they are called here."""


def _totals(llm: Any, job: Job) -> dict[str, float]:
    """What only grows: vLLM's counters, and with DiffKV what its requests have spent so far."""
    totals: dict[str, float] = dict.fromkeys(COUNTERS.values(), 0)
    for metric in llm.get_metrics():
        if metric.name in COUNTERS:
            totals[COUNTERS[metric.name]] += metric.value
    ours = {} if job.options is None else llm.collective_rpc("diffkv_summary")[0]["totals"]
    return {**totals, **ours}


def _forget(llm: Any) -> bool:
    """Empty the prefix cache, so that no run profits from another; whether there is one."""
    is_caching = bool(llm.llm_engine.vllm_config.cache_config.enable_prefix_caching)
    if is_caching and not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache was not emptied: another run's hits would count")
    return is_caching


def _measured(llm: Any, job: Job, load: Load) -> dict[str, Any]:
    """Run a load in an engine that is warm, and count."""
    from vllm.platforms import current_platform

    is_caching = _forget(llm)
    before, cpu_before = _totals(llm, job), time.process_time()
    steps, seconds, conversations = _drive(llm, load, job.turns, job.profile)
    cpu_seconds = time.process_time() - cpu_before
    spent = {name: value - before[name] for name, value in _totals(llm, job).items()}
    generated = sum(len(answer) for each in conversations for answer in each.answers)
    result: dict[str, Any] = {
        **_bytes(llm, job, steps, spent, is_caching),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_s": generated / seconds,
        "decode_tokens_per_s": steps.decode_tokens / max(steps.decode_seconds, 1e-9),
        "prefill_tokens_per_s": steps.prefill_tokens / max(steps.prefill_seconds, 1e-9),
        "ms_per_decode_step": steps.decode_seconds / max(steps.decode_steps, 1) * 1e3,
        "running_per_decode_step": steps.decode_tokens / max(steps.decode_steps, 1),
        "max_running": steps.max_running,
        "preemptions": int(spent["preemptions"]),
        "peak_memory_bytes": _peak_memory(current_platform.device_type),
    }
    if job.turns:
        result |= {"hit_rate": spent["hits"] / max(spent["asked"], 1), **by_turn(conversations)}
    if job.answers:
        result["answers"] = [each.answers for each in conversations]
    return result


def _bytes(
    llm: Any, job: Job, steps: _Steps, spent: dict[str, float], is_caching: bool
) -> dict[str, float]:
    """Bytes of a token: with vLLM's own cache its blocks', with DiffKV what its requests have spent.

    Requests that share blocks hold fewer than they have tokens for: where prefixes are cached, vLLM's
    own are those of a full block.
    """
    if job.options is not None:
        kept = spent["num_tokens"]
        return {
            "bytes_per_token": spent["num_bytes"] / kept,
            "high_share": spent["high"] / kept,
            "low_share": spent["low"] / kept,
        }
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    held, covered = (1, llm.llm_engine.vllm_config.cache_config.block_size)
    if not is_caching:
        held, covered = steps.peak
    return {"bytes_per_token": held * job.kv_bytes / manager.block_pool.num_gpu_blocks / covered}


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
