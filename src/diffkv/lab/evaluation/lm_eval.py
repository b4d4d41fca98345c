"""lm-evaluation-harness drives vLLM, with DiffKV and with vLLM's own cache.

The harness makes the prompts, runs the engine and scores the answers; what is here starts its engine
with our arguments, reads what the cache spent, and pairs the scores of the two caches by sample.
"""

import contextlib
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffkv.lab.evaluation.benchmarks import Benchmark
from diffkv.lab.evaluation.results import TaskScore
from diffkv.lab.evaluation.synth import paired_score
from diffkv.quant import ConfigError
from diffkv.use import CacheUse
from diffkv.vllm_plugin.front.offline import (
    engine_arguments,
    first_line,
    refusals_in_one_line,
)
from diffkv.vllm_plugin.front.session import Meter
from diffkv.vllm_plugin.options import Options

__all__ = ["SETTING", "Scores", "paired", "run"]

SETTING = "benchmark"

THINK_END = "</think>"
"""What ends the thoughts of the models that --thinking is for; only what follows is scored."""

Key = tuple[str, int, int]
"""(task, document, round) of a sample."""


@dataclass
class Scores:
    """Scores of one benchmark with one cache.

    Attributes:
        items: score of each sample.
        use: use of the cache; None with vLLM's own.
    """

    items: dict[Key, float] = field(default_factory=dict)
    use: CacheUse | None = None


@contextlib.contextmanager
def _model(arguments: dict[str, Any], options: Options | None, thinking: bool) -> Iterator[Any]:
    """The harness's own model class around an engine of ours, for a while."""
    args = engine_arguments(arguments, options)
    with refusals_in_one_line(args) as args:
        from lm_eval.models.vllm_causallms import VLLM

        own = {"think_end_token": THINK_END, "enable_thinking": True} if thinking else {}
        rest = {name: value for name, value in args.items() if name != "model"}
        model = VLLM(pretrained=args["model"], **own, **rest)
    try:
        yield model
    finally:
        model.model.llm_engine.engine_core.shutdown()
        del model
        gc.collect()


def run(
    benchmarks: Sequence[Benchmark],
    arguments: dict[str, Any],
    options: Options | None,
    *,
    limit: int | None = None,
    thinking: bool = False,
    run_code: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Scores]:
    """Run benchmarks with an engine of their own.

    Args:
        benchmarks: what to run.
        arguments: arguments of vLLM's engine, the model among them.
        options: DiffKV's; None runs vLLM with its own cache.
        limit: samples of each task; None takes all.
        thinking: whether the model thinks before it answers.
        run_code: whether programs that the model wrote may be executed.
        progress: is told what runs.

    Raises:
        ConfigError: the engine cannot start, a task does not exist, or its data cannot be had.
    """
    for benchmark in benchmarks:
        if benchmark.runs_code and not run_code:
            raise ConfigError(
                f"{benchmark.name} executes programs that the model writes: give --run-code to allow "
                f"it, on a machine where they can do no harm"
            )
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the `evaluate` library asks for it too
    found = []
    with _stdout_to_stderr(), _model(arguments, options, thinking) as model:
        meter = Meter(model.model, options)
        for benchmark in benchmarks:
            progress(benchmark.name)
            scores = Scores()
            for number in range(benchmark.rounds):
                samples = _samples(model, benchmark, limit, run_code)
                scores.items |= _scores(benchmark, samples, number)
            scores.use = meter.take()
            found.append(scores)
    return found


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """The harness and the libraries that it loads print; standard output is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@functools.cache
def _task_manager(with_the_harness_own: bool) -> Any:
    """The harness's index of its tasks, which takes seconds to make; a task of a file needs none."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_the_harness_own)


def _samples(
    model: Any, benchmark: Benchmark, limit: int | None, run_code: bool
) -> dict[str, list[dict[str, Any]]]:
    """Every sample of every task of a benchmark, as the harness logs them."""
    from lm_eval import simple_evaluate

    is_local = isinstance(benchmark.task, dict)
    generation: dict[str, Any] = {}
    if benchmark.max_tokens is not None:
        generation["max_gen_toks"] = benchmark.max_tokens
    if benchmark.sampling:
        generation |= {"do_sample": True, **benchmark.sampling}
    try:
        results = simple_evaluate(
            model=model,
            tasks=[benchmark.task],
            num_fewshot=benchmark.num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=benchmark.chat,
            gen_kwargs=generation or None,
            task_manager=_task_manager(not is_local),
            confirm_run_unsafe_code=run_code,
        )
    except ImportError as error:
        raise ConfigError(f"{benchmark.name} needs another package: {first_line(error)}") from error
    except (KeyError, ValueError, OSError) as error:
        reason = first_line(error)
        raise ConfigError(f"the harness cannot run {benchmark.name}: {reason}") from error
    samples: dict[str, list[dict[str, Any]]] = results["samples"]
    return samples


def _scores(
    benchmark: Benchmark, samples: dict[str, list[dict[str, Any]]], number: int
) -> dict[Key, float]:
    scores: dict[Key, float] = {}
    for task, rows_ in samples.items():
        there = sorted({(name, row["filter"]) for row in rows_ for name in row["metrics"]})
        metric = benchmark.metric or (there[0] if len(there) == 1 else None)
        if metric not in there:
            raise ConfigError(
                f"{benchmark.name}: {task} has the metrics {', '.join(map('/'.join, there))}: choose "
                f"one as harness:NAME:METRIC/FILTER, or leave one in the task's file"
            )
        for row in rows_:
            if row["filter"] == metric[1]:
                score = float(row[metric[0]])
                if not 0 <= score <= 1:
                    raise ConfigError(f"{benchmark.name}: {metric[0]} is {score}, not in 0 to 1")
                scores[task, row["doc_id"], number] = score
    return scores


def paired(
    benchmarks: Sequence[Benchmark], full: Sequence[Scores], ours: Sequence[Scores]
) -> list[TaskScore]:
    """Join the runs of the two caches, sample by sample.

    Args:
        benchmarks: what was run.
        full: with vLLM's own cache.
        ours: with DiffKV.
    """
    joined = []
    for benchmark, one, other in zip(benchmarks, full, ours, strict=True):
        assert one.items.keys() == other.items.keys() and other.use is not None, "the same samples"
        keys = sorted(one.items)
        before, after = ([scores.items[key] for key in keys] for scores in (one, other))
        joined.append(paired_score(benchmark.name, SETTING, after, before, other.use))
    return joined
