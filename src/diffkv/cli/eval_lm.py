"""The suite `lm-eval` of `diffkv eval`: real benchmarks, run by lm-evaluation-harness."""

import argparse
import functools
import importlib.metadata
import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffkv.cli import prompts
from diffkv.cli.arguments import positive
from diffkv.cli.engine_options import cache_options
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.evaluation.results import Method
    from diffkv.lab.rows import Row
    from diffkv.vllm_plugin.options import Options

__all__ = ["SUITE", "add_arguments", "evaluate"]

SUITE = "lm-eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only this suite has."""
    group = parser.add_argument_group(
        f"suite {SUITE}",
        "--tasks gsm8k,minerva_math,… (docs/evaluation.md lists them), files of tasks (*.yaml), or "
        "harness:NAME for any other task of lm-evaluation-harness; options that are not listed go to "
        "vLLM's engine",
    )
    group.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="the first N samples of each task (default: all)",
    )
    group.add_argument(
        "--thinking",
        action="store_true",
        help="the model thinks before it answers: chat template, sampling and lengths for that",
    )
    group.add_argument(
        "--run-code",
        action="store_true",
        help="execute programs that the model writes, as HumanEval and MBPP need: not in a sandbox",
    )


def _check(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--suite {SUITE} needs lm-eval: pip install 'diffkv[eval]'")
    if not args.tasks:
        raise ConfigError(f"--suite {SUITE} runs what --tasks names: gsm8k, minerva_math, …")


def evaluate(args: argparse.Namespace) -> "Iterator[Row]":
    """Run the tasks with vLLM's own cache, then with DiffKV, once for each seed."""
    _check(args)
    prompts.silence_engine()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    options = cache_options(args, takes_policy=args.policy != "none")
    if args.policy == "none":
        if (args.alpha_high, args.alpha_low) != (None, None):
            raise ConfigError("policy none has no thresholds: leave out --alpha-high, --alpha-low")
        options = options.without_thresholds()
    from diffkv.lab.evaluation import benchmarks

    found = benchmarks.find(args.tasks.split(","), args.thinking)
    from diffkv.lab.evaluation import lm_eval
    from diffkv.lab.evaluation.results import TASKS, figures
    from diffkv.lab.provenance import collect
    from diffkv.lab.rows import Writer

    method = _method(args, options)
    writer = Writer(collect(prompts.device()), args.out, resume=args.resume)
    for seed in args.seed:
        case = {
            **method.case(),
            "dtype": args.dtype or "auto",
            "suite": SUITE,
            "tasks": [each.name for each in found],
            "settings": [lm_eval.SETTING],
            "samples": args.limit,
            "thinking": args.thinking,
            "harness": importlib.metadata.version("lm_eval"),
            "seed": seed,
        }
        row = writer.find(TASKS, case)
        if row is None:
            start = time.perf_counter()
            arguments = prompts.engine_arguments(args, seed=seed, dtype=args.dtype or "auto")
            full, ours = (
                lm_eval.run(
                    found,
                    arguments,
                    cache,
                    limit=args.limit,
                    thinking=args.thinking,
                    run_code=args.run_code,
                    progress=functools.partial(_say, args, words),
                )
                for words, cache in (("vLLM's own cache", None), ("DiffKV", options))
            )
            scores = lm_eval.paired(found, full, ours)
            seconds = round(time.perf_counter() - start, 1)
            row = writer.add(TASKS, case, {**figures(TASKS, scores), "seconds": seconds})
        yield row


def _method(args: argparse.Namespace, options: "Options") -> "Method":
    """The compressed cache as rows name it."""
    from diffkv.lab.evaluation.results import Method

    thresholds = options.thresholds()
    return Method(
        args.model,
        "vllm",
        str(options.quant_config()),
        args.policy or options.policy,
        thresholds.alpha_high,
        thresholds.alpha_low,
        options.window,
        options.rotation(),
        options.segment,
        Method.words(options.page_bytes, options.kernels, options.drops),
    )


def _say(args: argparse.Namespace, cache: str, task: str) -> None:
    if not args.json:
        print(f"diffkv: {task}, {cache}", file=sys.stderr)
