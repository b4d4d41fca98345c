"""The suite `lm-eval` of `diffkv eval`: real benchmarks, run by lm-evaluation-harness."""

import argparse
import functools
import importlib.util
import logging
import sys
import time
from typing import TYPE_CHECKING

from diffkv.cli.engine_options import cache_options, model_folder
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.evaluation.results import Run

__all__ = ["SUITE", "add_arguments", "evaluate"]

SUITE = "lm-eval"
PACKAGES = ("torch", "lm_eval", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only this suite has."""
    group = parser.add_argument_group(
        f"suite {SUITE}",
        "--tasks gsm8k,minerva_math,… (docs/evaluation.md lists them), files of tasks (*.yaml), or "
        "harness:NAME for any other task of lm-evaluation-harness; options that are not listed go to "
        "vLLM's engine",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="the first N samples of each task (default: all)"
    )
    group.add_argument(
        "--thinking", action="store_true",
        help="the model thinks before it answers: chat template, sampling and lengths for that",
    )  # fmt: skip
    group.add_argument(
        "--run-code", action="store_true",
        help="execute programs that the model writes, as HumanEval and MBPP need: not in a sandbox",
    )  # fmt: skip


def _check(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--suite {SUITE} needs lm-eval: pip install 'diffkv[eval]'")
    if not args.tasks:
        raise ConfigError(f"--suite {SUITE} runs what --tasks names: gsm8k, minerva_math, …")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    for name in ("device", "settings", "language", "texts"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} does not go with --suite {SUITE}: leave it out")


def evaluate(args: argparse.Namespace) -> "Run":
    """Run the tasks with vLLM's own cache, then with DiffKV."""
    from diffkv.cli.generate import silence_engine

    _check(args)
    silence_engine()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    options = cache_options(args, takes_policy=args.policy != "none")
    if args.policy == "none":
        if (args.alpha_high, args.alpha_low) != (None, None):
            raise ConfigError("policy none has no thresholds: leave out --alpha-high, --alpha-low")
        options = options.without_thresholds()
    from diffkv.lab.evaluation import benchmarks

    found = benchmarks.find(args.tasks.split(","), args.thinking)
    from diffkv.lab.evaluation import lm_eval
    from diffkv.lab.evaluation.intervals import interval
    from diffkv.lab.evaluation.results import Run
    from diffkv.lab.evaluation.runs import provenance
    from diffkv.vllm_plugin.front.offline import check_model, engine_flags

    model = model_folder(args.model)
    check_model(model)
    arguments = {
        "model": model, "enforce_eager": True, "seed": args.seed, "dtype": args.dtype or "auto",
        **engine_flags(args.flags),
    }  # fmt: skip
    start = time.perf_counter()
    scores = []
    for words, cache in (("vLLM's own cache", None), ("DiffKV", options)):
        scores.append(
            lm_eval.run(
                found, arguments, cache, limit=args.limit, thinking=args.thinking,
                run_code=args.run_code, progress=functools.partial(_say, args, words),
            )
        )  # fmt: skip
    thresholds = options.thresholds()
    return Run(
        model=args.model, engine="vllm", quant=str(options.quant_config()),
        policy=args.policy or options.policy,
        alpha_high=thresholds.alpha_high, alpha_low=thresholds.alpha_low, window=options.window,
        rotate=options.rotation(), seed=args.seed, suite=SUITE,
        tasks=lm_eval.rows(found, scores[0], scores[1], interval),
        seconds=time.perf_counter() - start, provenance=provenance(_device(), PACKAGES),
    )  # fmt: skip


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _say(args: argparse.Namespace, cache: str, task: str) -> None:
    if not args.json:
        print(f"diffkv: {task}, {cache}", file=sys.stderr)
