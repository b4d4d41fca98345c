"""How far caches are from full precision: tables by length of the texts, and plots against bytes."""

from collections.abc import Sequence
from pathlib import Path

from diffkv.lab import plots
from diffkv.lab.evaluation.results import ALL_TEXTS, DistanceScore
from diffkv.lab.page import Column, Page, file_name, number, percent, times
from diffkv.lab.report.load import Measured
from diffkv.lab.rows import Row

__all__ = ["add_distances", "flat"]

ENGINES = {"hf": "transformers", "vllm": "vLLM"}
OURS, OTHERS = "o", "D"
PLOTS = (
    ("kld-mean", "mean KL from full precision, nats (at least 1e-5)"),
    ("kld-p99", "99 % quantile of KL from full precision, nats (at least 1e-5)"),
)
LEAST_KLD = 1e-5
"""Where a plot ends: what is less is drawn there."""

NOTE = """\
KL(full ‖ cache) of the next token, in nats, of texts that all caches read. *Same*: how often the first
choice is that of full precision. *Agrees for*: tokens of full precision's own answers, of {steps}, up to
the first that the cache would not have chosen. B/token: real bytes of all layers, whole pages or blocks
and tables included; a format of others in transformers is charged for its tokens alone."""


def _texts(row: Row) -> tuple[object, ...]:
    """What rows that can be compared have in common."""
    return tuple(row[name] for name in ("model", "engine", "dtype", "sha256", "max_steps"))


COLUMNS: list[Column[tuple[Row, DistanceScore]]] = [
    ("cache", lambda pair: str(pair[0]["cache"])),
    ("B/token", lambda pair: number(pair[1].bytes_per_token, 0)),
    ("vs bf16", lambda pair: times(pair[1].ratio_bf16)),
    ("mean KL", lambda pair: f"{pair[1].kld_mean:.4f}"),
    ("median", lambda pair: f"{pair[1].kld_median:.4f}"),
    ("99 %", lambda pair: f"{pair[1].kld_p99:.3f}"),
    ("99.9 %", lambda pair: f"{pair[1].kld_p999:.3f}"),
    ("same", lambda pair: percent(pair[1].same_top1)),
    ("perplexity", lambda pair: number(pair[1].perplexity, 2)),
    ("agrees for", lambda pair: number(pair[1].first_divergence)),
    ("high", lambda pair: percent(pair[1].high)),
    ("dropped", lambda pair: percent(pair[1].dropped)),
]


def add_distances(
    page: Page,
    found: Sequence[Measured],
    failed: Sequence[Row],
    folder: Path,
    with_plots: bool,
) -> list[str]:
    """Write a section for each model, engine and choice of texts.

    Args:
        page: is written to.
        found: rows and the scores of their cells.
        failed: rows of caches that could not be run.
        folder: of the plots.
        with_plots: whether to draw.

    Returns:
        Names of the plots.
    """
    written = []
    for texts in dict.fromkeys(_texts(row) for row, _ in found):
        group = [pair for pair in found if _texts(pair[0]) == texts]
        row, scores = group[0]
        place = f"{row['model']} in {ENGINES.get(row['engine'], row['engine'])}"
        page.heading(f"{place}: distance from full precision")
        page.text(NOTE.format(steps=row["max_steps"]))
        for index, context in enumerate(row["contexts"]):
            column = [(other, cells[index]) for other, cells in group]
            page.text(_title(row, scores[index]))
            page.table(COLUMNS, sorted(column, key=lambda pair: pair[1].bytes_per_token))
            if with_plots and context == ALL_TEXTS:
                for key, label in PLOTS:
                    name = file_name(key, *map(str, texts))
                    _draw(folder / name, place, label, key.replace("-", "_"), column)
                    page.plot(name, f"{label}, against bytes of a token: {place}")
                    written.append(name)
        page.failures(
            [row for row in failed if _texts(row) == texts], lambda row: str(row["cache"])
        )
    return written


def _title(row: Row, score: DistanceScore) -> str:
    which = "all lengths" if score.context == ALL_TEXTS else f"{score.context:,} tokens"
    if score.context == ALL_TEXTS and len(row["contexts"]) == 1:
        which = "one length"
    return (
        f"Texts of {which}: {score.n}, {score.steps:,} steps, model in {row['dtype']}; full precision "
        f"has perplexity {score.perplexity_full:.2f}:"
    )


def _draw(
    path: Path,
    place: str,
    label: str,
    key: str,
    column: Sequence[tuple[Row, DistanceScore]],
) -> None:
    points = [
        plots.Spot(
            str(row["cache"]),
            score.bytes_per_token,
            max(LEAST_KLD, getattr(score, key)),
            OURS if "quant" in row.case else OTHERS,
        )
        for row, score in column
    ]
    names = {OURS: "DiffKV", OTHERS: "others"}
    plots.spots(path, place, "bytes of a token, all layers", label, points, names)


def flat(row: Row, score: DistanceScore) -> dict[str, object]:
    """One line of a CSV file."""
    case = {name: row[name] for name in ("model", "engine", "dtype", "cache", "sha256")}
    return {**case, **vars(score)}
