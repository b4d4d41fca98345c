"""`diffkv calibrate`: choose thresholds for a model, by its own answers."""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffkv import policies
from diffkv.cli import prompts
from diffkv.cli.arguments import Joined, num_tokens, positive
from diffkv.cli.engine_options import DEFAULT_QUANT, REFERENCE, model_folder
from diffkv.cli.models import config_file
from diffkv.policy import WINDOW, Thresholds
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from diffkv.lab.calibrate.file import Calibration, Source
    from diffkv.lab.calibrate.journal import Journal
    from diffkv.lab.calibrate.questions import Question
    from diffkv.lab.calibrate.search import Point, Setting
    from diffkv.vllm_plugin.options import Options

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""Options that are not listed here are those of vLLM's engine."""

SYNTH = "synth"
SYNTH_SAMPLES = 100
DEFAULT_OUT = Path("calibration.toml")
PARTIAL = ".partial"
RULE_OF_THREE = 3.0
"""What one sample in n / 3 loses is missed by n samples with a probability of 5 %."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    prompts.add_engine_options(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help=f'prompts: JSON lines with "prompt" and, if known, "answer", or one text a line; or '
        f"{SYNTH}: questions about facts in the context, made for the model",
    )
    parser.add_argument(
        "--max-loss",
        type=_share,
        required=True,
        metavar="SHARE",
        help="the loss to stay within, as 1%% or 0.01: of right words where answers are known, else of "
        "the tokens that full precision answers",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=DEFAULT_OUT,
        help="the file to write (default: %(default)s)",
    )
    _add_question_options(parser)
    parser.add_argument(
        "--quant", default=DEFAULT_QUANT, help="formats of the tiers (default: %(default)s)"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=WINDOW,
        help="recent tokens that stay high (default: %(default)s)",
    )
    parser.add_argument(
        "--search",
        action=Joined,
        default="alpha_high,alpha_low",
        metavar="WHAT",
        help="what is searched, separated by commas: alpha_high, alpha_low, and distinct, the share of "
        "a prompt that stays because its keys are unlike others (default: %(default)s)",
    )
    parser.epilog = (
        "A run that was stopped goes on from FILE.partial. Any other option is passed on to vLLM's "
        "engine: --dtype, --max-model-len, …"
    )


def _add_question_options(parser: argparse.ArgumentParser) -> None:
    """Declare what is taken of the data, and how answers are scored."""
    parser.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help=f"so many of the prompts, at random (default: all; {SYNTH_SAMPLES} of {SYNTH})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument(
        "--prompt-tokens",
        type=num_tokens,
        default=1024,
        metavar="N",
        help=f"length of the prompts of {SYNTH} (default: %(default)s)",
    )
    parser.add_argument(
        "--match",
        choices=("place", "anywhere"),
        default="place",
        help="how answers of a FILE are scored: each word at its place, or the whole answer anywhere "
        "in what the model says (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="new tokens for each prompt of a FILE (default: 64)",
    )


def _share(text: str) -> float:
    """A share as `1%` or `0.01`."""
    match = re.fullmatch(r"(\d*\.?\d+)(%?)", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a share of 0 to 1, as 1% or 0.01, got {text!r}")
    return value


def _questions(args: argparse.Namespace) -> "list[Question]":
    from diffkv.lab.calibrate import questions

    if args.data == SYNTH:
        language = "reference" if args.model == REFERENCE else "english"
        num = args.samples or SYNTH_SAMPLES
        drawn = questions.synthetic(language, args.prompt_tokens, num, args.seed)
        return questions.choose(drawn, None, args.seed)
    scoring = questions.ANYWHERE if args.match == "anywhere" else questions.PLACE
    num_tokens = args.max_tokens or prompts.DEFAULT_MAX_TOKENS
    found = []
    for each in prompts.read_questions(Path(args.data), "--data"):
        answer = None if each.answer is None else questions.as_answer(each.answer, scoring)
        found.append(questions.Question(each.prompt, answer, num_tokens, scoring))
    return questions.choose(found, args.samples, args.seed)


def _options(args: argparse.Namespace) -> "Options":
    """What the engine starts with; thresholds come with each request."""
    from diffkv.vllm_plugin.options import Options

    return Options.parse({"quant": args.quant, "window": args.window}).without_thresholds()


def _steps(args: argparse.Namespace, options: "Options") -> tuple[str, ...]:
    """What `--search` names."""
    from diffkv.lab.calibrate.search import ALPHA_HIGH, DISTINCT, STEPS

    named = args.search.split(",")
    for name in named:
        if name not in STEPS:
            raise ConfigError(f"--search cannot take {name!r}: there are {', '.join(STEPS)}")
    if DISTINCT in named:
        if ALPHA_HIGH not in named:
            raise ConfigError(
                f"--search {DISTINCT} drops low tokens, and {ALPHA_HIGH} says which are: name both"
            )
        dropping = policies.with_distinct(options.policy, 0.5)
        policies.parse(dropping).check(options.quant_config())
    return tuple(step for step in STEPS if step in named)


def run(args: argparse.Namespace) -> int:
    """Search, write the file, and print what was chosen."""
    if not args.verbose:
        prompts.silence_engine()
    options = _options(args)
    steps = _steps(args, options)
    if not args.out.parent.is_dir():
        raise ConfigError(f"cannot write --out {args.out}: {args.out.parent} is no folder")
    from diffkv.lab.calibrate import file, questions
    from diffkv.lab.calibrate.journal import Journal

    asked = _questions(args)
    model = file.Model(
        name=args.model, config_sha256=file.model_digest(config_file(model_folder(args.model)))
    )
    data = file.Data(
        source=args.data if args.data == SYNTH else Path(args.data).name,
        samples=len(asked),
        seed=args.seed,
        sha256=questions.digest(asked),
        metric=questions.metric(asked),
    )
    identity = {
        "model": model.model_dump(),
        "data": data.model_dump(),
        "flags": args.flags,
        "quant": options.quant,
        "window": options.window,
    }
    journal = Journal(args.out.with_name(args.out.name + PARTIAL), identity)
    if journal.num_found:
        print(f"diffkv: going on from {args.out}{PARTIAL}", file=sys.stderr)
    choice, curve = _search(args, options, steps, asked, journal, data.metric)
    if choice is None:
        raise ConfigError(_nothing_fits(args, options, curve[0]))
    chosen = file.Choice.of(choice, quant=options.quant, window=options.window)
    calibration = file.Calibration(
        max_loss=args.max_loss,
        model=model,
        data=data,
        choice=chosen,
        source=_source(),
        curve=[file.CurvePoint.of(point) for point in curve],
    )
    calibration.write(args.out)
    journal.remove()
    _print(args, calibration)
    return 0


def _search(
    args: argparse.Namespace,
    options: "Options",
    steps: tuple[str, ...],
    asked: "list[Question]",
    journal: "Journal",
    metric: str,
) -> "tuple[Point | None, list[Point]]":
    """Full precision first, in an engine that is gone before ours starts; then the search."""
    from rich.console import Console

    from diffkv.lab.calibrate.engine import engines, full_precision, measure
    from diffkv.lab.calibrate.search import Part, search

    arguments = prompts.engine_arguments(args)
    console = Console(stderr=True, highlight=False)
    with _progress(console) as progress:
        bar = progress.add_task("full precision, vLLM's own cache", total=len(asked))
        full = journal.get("full", lambda: full_precision(arguments, asked, metric))
        progress.update(bar, completed=len(asked))
        with engines(arguments, options) as engine:
            ask = journal.kept(measure(engine, asked, metric, full))

            def watched(setting: "Setting", samples: range) -> Part:
                progress.update(bar, description=str(setting), completed=samples.start)
                part = ask(setting, samples)
                progress.update(bar, completed=samples.stop)
                return part

            def measured(point: "Point") -> None:
                progress.console.print(_line(point), soft_wrap=True)

            has_low = options.quant_config().has_low
            return search(watched, len(asked), args.max_loss, has_low, steps, measured)


def _progress(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _line(point: "Point") -> str:
    low, high = point.ci95
    verdict = "within the limit" if point.accepted else "too much"
    return (
        f"{point.setting}: loss {point.loss:.2%} ({low:.2%} to {high:.2%}) on {point.n} "
        f"samples, {point.use.bytes_per_token:.1f} B a token: {verdict}"
    )


def _nothing_fits(args: argparse.Namespace, options: "Options", mildest: "Point") -> str:
    return (
        f"nothing keeps the loss within {args.max_loss:.2%}: {options.quant_config().high} alone, "
        f"every token high, loses {mildest.loss:.2%} of {mildest.n} samples; take a larger "
        f"--max-loss, or a --quant with a better high tier"
    )


def _print(args: argparse.Namespace, calibration: "Calibration") -> None:
    from diffkv.lab.calibrate.search import Setting

    choice = calibration.choice
    low, high = choice.loss_ci95
    setting = Setting(Thresholds(choice.alpha_high, choice.alpha_low), choice.distinct)
    print(
        f"{setting}: loss {choice.loss:.2%} (95 % interval {low:.2%} to {high:.2%}, "
        f"{choice.samples} samples), {choice.bytes_per_token:.1f} B a token, "
        f"{choice.ratio_bf16:.2f}x less than bf16"
    )
    if max(high, RULE_OF_THREE / choice.samples) > args.max_loss:
        print(
            f"diffkv: {choice.samples} samples are too few to be sure of {args.max_loss:.2%}: give "
            f"more --samples",
            file=sys.stderr,
        )
    print(f"{args.out} is written; use it as --calibration {args.out}")


def _source() -> "Source":
    from diffkv.lab.calibrate import file
    from diffkv.lab.provenance import collect

    origin = collect()
    versions = {"diffkv": origin.diffkv, "torch": origin.torch, "vllm": str(origin.vllm)}
    return file.Source(command=origin.command, versions=versions)
