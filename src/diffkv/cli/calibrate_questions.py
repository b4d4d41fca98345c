"""`diffkv calibrate --max-loss`: by the answers that the model gives in vLLM."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkv.cli import prompts
from diffkv.cli.engine_options import SHIPPED
from diffkv.quant import ConfigError, QuantConfig

if TYPE_CHECKING:
    from diffkv.lab.calibrate.file import Calibration, Model
    from diffkv.lab.calibrate.journal import Journal
    from diffkv.lab.calibrate.questions import Question
    from diffkv.lab.calibrate.search import Point, Setting
    from diffkv.vllm_plugin.options import Options

__all__ = ["PROMPT_TOKENS", "SEARCH", "SYNTH", "SYNTH_SAMPLES", "calibrate"]

SEARCH = "alpha_high,alpha_low"
SYNTH = "synth"
SYNTH_SAMPLES = 100
PROMPT_TOKENS = 1024
LEAST_FULL = 0.2
"""Share of right answers that full precision must have."""
RULE_OF_THREE = 3.0
"""What one sample in n / 3 loses is missed by n samples with a probability of 5 %."""


def _questions(args: argparse.Namespace, seed: int) -> "list[Question]":
    from diffkv.lab.calibrate import questions

    if args.data == SYNTH:
        language = args.model if args.model in SHIPPED else "english"
        num, length = args.samples or SYNTH_SAMPLES, args.prompt_tokens or PROMPT_TOKENS
        return questions.choose(questions.synthetic(language, length, num, seed), None, seed)
    scoring = questions.ANYWHERE if args.match == "anywhere" else questions.PLACE
    num_tokens = args.max_tokens or prompts.DEFAULT_MAX_TOKENS
    found = []
    for each in prompts.read_questions(Path(args.data), "--data"):
        answer = None if each.answer is None else questions.as_answer(each.answer, scoring)
        found.append(questions.Question(each.prompt, answer, num_tokens, scoring))
    return questions.choose(found, args.samples, seed)


def calibrate(
    args: argparse.Namespace, model: "Model", quants: list[QuantConfig], steps: tuple[str, ...]
) -> int:
    """Search, write the file, and print what was chosen.

    Args:
        args: the command line's.
        model: which.
        quants: one: the formats.
        steps: what is searched.
    """
    if not args.verbose:
        prompts.silence_engine()
    if args.dtype is not None:
        args.flags = [*args.flags, "--dtype", args.dtype]
    from diffkv.cli.progress import going_on
    from diffkv.lab.calibrate import file, questions
    from diffkv.vllm_plugin.options import Options

    (quant,) = quants
    # Thresholds come with each request
    options = Options(str(quant), window=args.window).without_thresholds()
    seed = args.seed or 0
    asked = _questions(args, seed)
    data = file.Data(
        source=args.data if args.data == SYNTH else Path(args.data).name,
        samples=len(asked),
        seed=seed,
        sha256=questions.digest(asked),
        metric=questions.metric(asked),
    )
    identity = {
        "model": model.model_dump(),
        "data": data.model_dump(exclude_none=True),
        "flags": args.flags,
        "quant": options.quant,
        "window": options.window,
        "segment": options.segment,
    }
    journal = going_on(args.out, identity)
    choice, curve = _search(args, options, steps, asked, journal, data.metric)
    if choice is None:
        raise ConfigError(_nothing_fits(args, options, curve[0]))
    chosen = file.Choice.of(
        choice, quant=options.quant, window=options.window, segment=options.segment
    )
    calibration = file.Calibration(
        max_loss=args.max_loss,
        model=model,
        data=data,
        choice=chosen,
        source=file.Source.here("vllm"),
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
    from diffkv.cli.progress import progress
    from diffkv.lab.calibrate.engine import engines, full_precision, measure
    from diffkv.lab.calibrate.search import Part, search

    arguments = prompts.engine_arguments(args)
    with progress() as bars:
        bar = bars.add_task("full precision, vLLM's own cache", total=len(asked))
        full = journal.get("full", lambda: full_precision(arguments, asked, metric))
        bars.update(bar, completed=len(asked))
        _check_full(full, metric)
        with engines(arguments, options) as engine:
            ask = journal.kept(measure(engine, asked, metric, full))

            def watched(setting: "Setting", samples: range) -> Part:
                bars.update(bar, description=str(setting), completed=samples.start)
                part = ask(setting, samples)
                bars.update(bar, completed=samples.stop)
                return part

            def measured(point: "Point") -> None:
                bars.console.print(_line(point), soft_wrap=True)

            has_low = options.quant_config().has_low
            return search(watched, len(asked), args.max_loss, has_low, steps, measured)


def _check_full(full: "list[Any]", metric: str) -> None:
    """Refuse to calibrate by questions that full precision cannot answer: nothing could be lost."""
    from diffkv.lab.calibrate.questions import RIGHT_WORDS

    if metric == RIGHT_WORDS and (mean := sum(full) / len(full)) < LEAST_FULL:
        raise ConfigError(
            f"full precision has {mean:.0%} of the answers right, and a calibration needs "
            f"{LEAST_FULL:.0%}, for what is wrong cannot be lost: ask what the model can answer, leave "
            f"the answers out, or find them anywhere in a text (--match anywhere)"
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
    choice = calibration.choice
    assert choice.loss_ci95 is not None, "questions are resampled"
    low, high = choice.loss_ci95
    print(
        f"{choice.setting}: loss {choice.loss:.2%} (95 % interval {low:.2%} to {high:.2%}, "
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
