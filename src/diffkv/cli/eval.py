"""`diffkv eval`: what answers lose when the cache is compressed, against full precision."""

import argparse
import importlib.util
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffkv.cli import eval_hf, eval_kld, eval_lm, eval_methods, prompts
from diffkv.cli.arguments import Joined, Listed, at_least, flag_of, num_tokens, positive
from diffkv.cli.engine_options import (
    REFERENCE,
    SHIPPED,
    add_cache_options,
    model_folder,
)
from diffkv.cli.models import check_hub
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.evaluation.engine import Compared
    from diffkv.lab.evaluation.results import TaskScore
    from diffkv.lab.evaluation.synth import Plan
    from diffkv.lab.rows import Row, Writer

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""With the suite lm-eval: options that are not listed here are those of vLLM's engine."""

SUITES = ("synth", "kld", eval_lm.SUITE)
DEFAULT_NUM_SAMPLES = 16
DEFAULT_TOKENS, LEAST_TOKENS = 1024, 256
DEFAULT_BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--suite",
        choices=SUITES,
        default=SUITES[0],
        help="synth: generated tasks; kld: distances of next-token distributions; lm-eval: real "
        "benchmarks in vLLM (default: synth)",
    )
    parser.add_argument(
        "--model", default=REFERENCE, help="a folder or a model id (default: the shipped model)"
    )
    parser.add_argument(
        "--engine",
        choices=("hf", "vllm"),
        default="hf",
        help="vllm: policies with thresholds and none; synth asks at the end of the prompt; kld "
        "compares vLLM's own caches too (default: hf, transformers)",
    )
    _add_run_options(parser)
    _add_suite_options(parser)
    eval_kld.add_arguments(parser)
    eval_lm.add_arguments(parser)
    add_cache_options(
        parser,
        "what decides: paper, paper-uniform, or a baseline (docs/evaluation.md); with settings as in "
        "topk:keep=0.25,sinks=4 or paper:distinct=0.75 (default: paper)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """Declare how often, where and into which file."""
    parser.add_argument(
        "--seed",
        type=at_least(0),
        nargs="+",
        action=Listed,
        default=[0],
        metavar="N",
        help="of the samples; each is a run of its own (default: 0)",
    )
    parser.add_argument(
        "--methods",
        type=Path,
        metavar="FILE",
        help="caches to compare, one a line: options of the group cache below, where what a line leaves "
        "out is as on the command line, or the name of another engine's format (q8_0, …)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the model (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the model (default: the GPU)")
    parser.add_argument(
        "--threads",
        type=positive,
        help="CPU threads of --engine hf (default: 1 for the shipped model, which is too small to share "
        "out; torch's own choice for others)",
    )
    parser.add_argument(
        "--batch-size", type=positive, help=f"samples at once (default: {DEFAULT_BATCH})"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines there too")
    parser.add_argument(
        "--resume", action="store_true", help="keep the lines of --out, and run what is missing"
    )
    parser.add_argument("--json", action="store_true", help="only JSON lines, no tables")


def _add_suite_options(parser: argparse.ArgumentParser) -> None:
    """Declare what is asked in the suite synth."""
    group = parser.add_argument_group("suite synth")
    group.add_argument(
        "--tasks", action=Joined, help="names, separated by commas (default: all of the language)"
    )
    group.add_argument(
        "--settings", action=Joined, help="easy, hard or easy,hard (default: what the engine can)"
    )
    group.add_argument(
        "--language",
        help="of the tasks: reference, reference-128, english, statements (default: by the model)",
    )
    group.add_argument(
        "--n",
        type=at_least(2),
        help=f"samples of a task (default: {DEFAULT_NUM_SAMPLES})",
    )
    group.add_argument(
        "--tokens",
        type=num_tokens,
        help=f"of a prompt (default: {DEFAULT_TOKENS})",
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse before anything is loaded."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("diffkv eval needs transformers: pip install 'diffkv[eval]'")
    _check_suite(args)
    for name in ("device", "threads"):
        if args.engine == "vllm" and getattr(args, name) is not None:
            raise ConfigError(f"--{name} is for --engine hf: vLLM chooses for itself")
    check_hub(model_folder(args.model))
    if args.resume and args.out is None:
        raise ConfigError("--resume goes on with a file: give --out")
    if args.out is not None and not args.out.parent.is_dir():
        raise ConfigError(f"cannot write --out {args.out}: there is no folder {args.out.parent}")
    args.n = args.n or DEFAULT_NUM_SAMPLES
    args.tokens = args.tokens or DEFAULT_TOKENS
    if args.tokens < LEAST_TOKENS:
        raise ConfigError(f"--tokens must be at least {LEAST_TOKENS}, got {args.tokens}")
    args.batch_size = args.batch_size or DEFAULT_BATCH


def _check_suite(args: argparse.Namespace) -> None:
    """Refuse options of other suites."""
    if args.suite != eval_lm.SUITE:
        if args.flags:
            raise ConfigError(
                f"unknown option {args.flags[0]}: only --suite lm-eval passes some on"
            )
        for name in ("limit", "thinking", "run_code"):
            if getattr(args, name):
                raise ConfigError(f"{flag_of(name)} is for --suite {eval_lm.SUITE}")
    own = {
        "kld": ("texts", "against", "contexts", "num_texts", "steps"),
        "synth": ("settings", "language", "n", "tokens"),
    }
    for suite, names in own.items():
        for name in names:
            if args.suite != suite and getattr(args, name) is not None:
                raise ConfigError(f"{flag_of(name)} is for --suite {suite}")
    for name in ("device", "methods", "batch_size", "threads"):
        if args.suite == eval_lm.SUITE and getattr(args, name) is not None:
            raise ConfigError(
                f"{flag_of(name)} does not go with --suite {eval_lm.SUITE}: leave it out"
            )
    if args.suite == "kld" and args.tasks is not None:
        raise ConfigError("--suite kld has no tasks: leave out --tasks")
    if args.suite == "kld" and args.seed != [0]:
        raise ConfigError("--suite kld draws nothing: leave out --seed")


def _plans(args: argparse.Namespace, vocabulary: Collection[str]) -> "list[Plan]":
    """What is asked, for each seed."""
    from diffkv.lab.evaluation.runs import language_of
    from diffkv.lab.evaluation.synth import Plan

    only = "easy" if args.engine == "vllm" else None
    own = args.model if args.model in SHIPPED else None
    language = language_of(vocabulary, args.language or own)
    return [
        Plan.choose(language, args.tasks, args.settings or only, args.tokens, args.n, seed)
        for seed in args.seed
    ]


def _writer(args: argparse.Namespace, device: str) -> "Writer":
    from diffkv.lab.provenance import collect
    from diffkv.lab.rows import Writer

    return Writer(collect(device), args.out, resume=args.resume)


def _hf(args: argparse.Namespace, caches: "list[Compared]") -> "Iterator[Row]":
    from diffkv.lab.evaluation.runs import run_tasks

    with eval_hf.loaded(args) as model:
        writer = _writer(args, model.model.device.type)
        plans = _plans(args, model.vocabulary)
        yield from run_tasks(
            model, args.model, caches, plans, writer, lambda score: _report(args, score)
        )


def _report(args: argparse.Namespace, score: "TaskScore") -> None:
    """Say on standard error what is done."""
    if not args.json:
        print(f"diffkv: {score.task} {score.setting}", file=sys.stderr)


def _vllm(args: argparse.Namespace, caches: "list[Compared]") -> "Iterator[Row]":
    prompts.silence_engine()
    given = {"dtype": args.dtype} if args.dtype else {}
    arguments = prompts.engine_arguments(args, max_num_seqs=args.batch_size, **given)
    from diffkv.lab.evaluation.hf_runs import vocabulary_of
    from diffkv.lab.evaluation.runs import run_tasks
    from diffkv.lab.evaluation.vllm_runs import VLLMModel

    plans = _plans(args, vocabulary_of(arguments["model"]))
    writer = _writer(args, prompts.device())
    with VLLMModel(arguments) as model:
        yield from run_tasks(model, args.model, caches, plans, writer)


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print a table and a JSON line for each cache and seed."""
    _check(args)
    if args.suite == "kld":
        return eval_kld.evaluate(args)
    if args.suite == eval_lm.SUITE:
        rows = eval_lm.evaluate(args)
    elif args.engine == "vllm":
        rows = _vllm(args, [cache.kind for cache in eval_methods.caches(args)])
    else:
        rows = _hf(args, [cache.kind for cache in eval_methods.caches(args)])
    for row in rows:
        if not args.json:
            from diffkv.cli.eval_tables import print_row

            print_row(row)
        print(row.to_json(), flush=True)
    return 0
