"""What `eval` prints for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from diffkv.lab.evaluation.results import (
    ALL_TEXTS,
    DistanceScore,
    Method,
    Score,
    TaskScore,
    scores,
)
from diffkv.lab.rows import Row

__all__ = ["print_distances", "print_row"]

TASK = ("task", "setting", "n", "accuracy", "full precision", "difference, 95 %")
DISTANCE = ("bytes", "vs bf16", "mean KL", "99 %", "same", "ppl", "differs at")
SPENT = ("bytes / token", "vs bf16 (bits alone)", "high / low / dropped")


def _spent(score: Score) -> tuple[str, ...]:
    return (
        f"{score.bytes_per_token:.1f}",
        f"{score.ratio_bf16:.2f}x ({score.nominal_ratio_bf16:.2f}x)",
        f"{score.high:.0%} / {score.low:.0%} / {score.dropped:.0%}",
    )


def _task(score: TaskScore) -> tuple[str, ...]:
    difference = f"{score.difference:+.3f} ({score.ci95_low:+.3f} .. {score.ci95_high:+.3f})"
    accuracies = f"{score.accuracy:.3f}", f"{score.accuracy_full:.3f}"
    return score.task, score.setting, str(score.n), *accuracies, difference


def print_row(row: Row) -> None:
    """Print the table of a row of tasks."""
    method, found = Method.of(row), scores(row)
    title = f"{method.model}, {method.label()}, seed {row.get('seed', 0)}"
    table = Table(*TASK, *SPENT, title=title)
    for score in found:
        table.add_row(*_task(score), *_spent(score))
    Console().print(table)


def _distance(cache: str, score: DistanceScore) -> tuple[str, ...]:
    return (
        cache,
        f"{score.bytes_per_token:,.0f}",
        f"{score.ratio_bf16:.2f}x",
        f"{score.kld_mean:.4f}",
        f"{score.kld_p99:.3f}",
        f"{score.same_top1:.1%}",
        f"{score.perplexity:.2f}",
        f"{score.first_divergence:.0f} of {score.steps // score.n}",
    )


def print_distances(rows: Sequence[Row]) -> None:
    """Print a table with a row for each cache; for texts of several lengths, one for each length too.

    Args:
        rows: of kind `DISTANCES`, all of the same texts.
    """
    caches = [str(row["cache"]) for row in rows]
    for column in zip(*(scores(row) for row in rows), strict=True):
        first = column[0]
        texts = "all texts" if first.context == ALL_TEXTS else f"texts of {first.context} tokens"
        exact = "float32" if rows[0]["engine"] == "vllm" else rows[0]["dtype"]
        full = f"full precision ({exact}) has perplexity {first.perplexity_full:.2f}"
        table = Table(
            Column("cache", overflow="fold"),
            *DISTANCE,
            title=f"{rows[0]['model']}, {texts}: {first.n}, {first.steps} steps; {full}",
            caption="bytes: of a token, all layers; same: first choice of the next token; "
            "ppl: perplexity; differs at: tokens of an answer until one differs",
        )
        for cache, score in zip(caches, column, strict=True):
            table.add_row(*_distance(cache, score))
        Console().print(table)
