"""`diffkv calibrate --max-kl`: by the distance from full precision that texts show in transformers."""

import argparse
import importlib.util
import math
from typing import TYPE_CHECKING

from diffkv.cli import eval_hf, texts
from diffkv.cli.engine_options import model_folder
from diffkv.cli.models import check_hub
from diffkv.quant import ConfigError, QuantConfig
from diffkv.segments import SEGMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffkv.lab.calibrate.distance import Limits, Tried
    from diffkv.lab.calibrate.file import Data, Model
    from diffkv.lab.calibrate.journal import Journal
    from diffkv.lab.evaluation.distances import Reading
    from diffkv.lab.evaluation.hf_runs import HFModel

__all__ = ["BATCH_SIZE", "SEARCH", "STEPS", "calibrate"]

SEARCH = "alpha_high"
STEPS = 64
BATCH_SIZE = 4
DTYPES = ("float32", "bfloat16", "float16")

FORMATS, ALPHA_LOW, DISTINCT = "formats", "alpha\nlow", "distinct"
COLUMNS: "dict[str, Callable[[Tried], str]]" = {
    FORMATS: lambda tried: str(tried.quant),
    "alpha\nhigh": lambda tried: f"{tried.setting.thresholds.alpha_high:g}",
    ALPHA_LOW: lambda tried: f"{tried.setting.thresholds.alpha_low:g}",
    DISTINCT: lambda tried: f"{tried.setting.distinct:g}",
    "bytes": lambda tried: f"{tried.score.bytes_per_token:,.0f}",
    "vs\nbf16": lambda tried: f"{tried.score.ratio_bf16:.2f}x",
    "mean\nKL": lambda tried: f"{tried.score.kld_mean:.4f}",
    "99 %": lambda tried: f"{tried.score.kld_p99:.3f}",
    "same": lambda tried: f"{tried.score.same_top1:.1%}",
}
MILDEST = {ALPHA_LOW: "0", DISTINCT: "1"}
"""Columns that say nothing where nothing is dropped."""


def calibrate(
    args: argparse.Namespace, model: "Model", quants: list[QuantConfig], steps: tuple[str, ...]
) -> int:
    """Search, write the file, and print what was tried and chosen.

    Args:
        args: the command line's.
        model: which.
        quants: formats to search.
        steps: what is searched of each.
    """
    _check(args)
    from diffkv.cli.progress import going_on
    from diffkv.lab.calibrate import file
    from diffkv.lab.calibrate.distance import Limits, choose, nearest

    content = texts.content(args)
    limits = Limits(args.max_kl) if args.max_p99 is None else Limits(args.max_kl, args.max_p99)
    with eval_hf.loaded(args) as engine:
        reading = texts.reading(args, content, engine)
        data = _data(args, reading)
        identity = {
            "model": model.model_dump(),
            "data": data.model_dump(),
            "dtype": engine.dtype,
            "window": args.window,
            "segment": SEGMENT,
        }
        journal = going_on(args.out, identity)
        tried = _search(args, engine, reading, journal, quants, limits, steps)
    choice = choose(tried)
    _print_table(args, data, tried, choice)
    if choice is None:
        raise ConfigError(_nothing_fits(limits, nearest(tried)))
    calibration = file.Calibration(
        max_loss=limits.mean,
        max_p99=args.max_p99,
        model=model,
        data=data,
        choice=file.Choice.tried(choice, window=args.window, segment=SEGMENT),
        source=file.Source.here("transformers"),
        curve=[file.CurvePoint.tried(each) for each in tried],
    )
    calibration.write(args.out)
    journal.remove()
    print(f"{choice}: {_figures(choice)}")
    print(f"{args.out} is written; use it as --calibration {args.out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse before anything is loaded; options that were left out get their defaults."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "diffkv calibrate --max-kl needs transformers: pip install 'diffkv[eval]'"
        )
    texts.check(args, STEPS)
    if args.dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {args.dtype}")
    args.batch_size = args.batch_size or BATCH_SIZE
    check_hub(model_folder(args.model))


def _data(args: argparse.Namespace, reading: "Reading") -> "Data":
    from diffkv.lab.calibrate import file

    return file.Data(
        source=texts.source(args),
        samples=len(reading.texts),
        seed=0,
        sha256=reading.case()["sha256"],
        metric=file.KLD,
        steps=reading.steps,
    )


def _search(
    args: argparse.Namespace,
    engine: "HFModel",
    reading: "Reading",
    journal: "Journal",
    quants: list[QuantConfig],
    limits: "Limits",
    steps: tuple[str, ...],
) -> "list[Tried]":
    """Measure what is not in the journal, with a bar and a line for each setting."""
    from diffkv.cli.progress import progress
    from diffkv.lab.calibrate.distance import reader, search
    from diffkv.lab.evaluation.kld import Comparison

    with progress() as bars:
        bar = bars.add_task("", total=len(reading.texts))

        def report(name: str, done: int, total: int) -> None:
            bars.update(bar, description=name, completed=done, total=total)

        def measured(tried: "Tried") -> None:
            verdict = "within the limits" if tried.accepted else "too far"
            bars.console.print(f"{tried}: {_figures(tried)}: {verdict}", soft_wrap=True)

        measure = reader(Comparison(engine, reading, report), args.window, journal)
        return search(measure, quants, limits, steps, measured)


def _figures(tried: "Tried") -> str:
    score = tried.score
    return (
        f"mean KL {score.kld_mean:.3g}, 99 % {score.kld_p99:.3g}, {score.bytes_per_token:.1f} B a "
        f"token, {score.ratio_bf16:.2f}x smaller than bf16"
    )


def _nothing_fits(limits: "Limits", nearest: "Tried") -> str:
    p99 = "" if math.isinf(limits.p99) else f" and its 99 % within {limits.p99:g}"
    return (
        f"nothing keeps the mean KL within {limits.mean:g}{p99}; the nearest is {nearest}: "
        f"{_figures(nearest)}; allow more, or give a --quant with a better high tier"
    )


def _print_table(
    args: argparse.Namespace, data: "Data", tried: "Sequence[Tried]", choice: "Tried | None"
) -> None:
    """A row for each setting, in the order of their bytes; thresholds that none has are left out."""
    from rich.console import Console
    from rich.table import Column, Table

    by_bytes = sorted(tried, key=lambda each: -each.score.bytes_per_token)
    columns = {name: [cell(each) for each in by_bytes] for name, cell in COLUMNS.items()}
    for name, mildest in MILDEST.items():
        if set(columns[name]) == {mildest}:
            del columns[name]
    table = Table(
        *(
            Column(name, justify="left" if name == FORMATS else "right", overflow="fold")
            for name in columns
        ),
        "",
        title=f"{args.model}, {data.samples} texts of {data.source}, {tried[0].score.steps} steps",
        caption="bytes: of a token, all layers; same: first choice of the next token",
    )
    for each, *cells in zip(by_bytes, *columns.values(), strict=True):
        verdict = "chosen" if each is choice else "" if each.accepted else "over"
        table.add_row(*cells, verdict)
    Console().print(table)
