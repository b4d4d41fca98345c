"""What `eval` prints for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from diffkv.lab.evaluation.results import Run, Use
from diffkv.lab.evaluation.vllm_kld import CacheDistances, Distance

__all__ = ["print_distances", "print_run"]


def _bytes(row: Use) -> tuple[str, ...]:
    return (
        f"{row.bytes_per_token:.1f}",
        f"{row.ratio_bf16:.2f}x ({row.nominal_ratio_bf16:.2f}x)",
        f"{row.high:.0%} / {row.low:.0%} / {row.dropped:.0%}",
    )


def print_run(run: Run) -> None:
    """Print one table."""
    spent = ("bytes / token", "vs bf16 (bits alone)", "high / low / dropped")
    title = f"{run.model}, {run.quant}, {run.policy}, seed {run.seed}"
    if run.tasks:
        table = Table(
            "task", "setting", "n", "accuracy", "full precision", "difference, 95 %", *spent,
            title=title,
        )  # fmt: skip
        for row in run.tasks:
            low, high = row.ci95_difference
            table.add_row(
                row.task, row.setting, str(row.n), f"{row.accuracy:.3f}", f"{row.accuracy_full:.3f}",
                f"{row.accuracy - row.accuracy_full:+.3f} ({low:+.3f} .. {high:+.3f})", *_bytes(row),
            )  # fmt: skip
    else:
        table = Table(
            "mode", "texts", "steps", "KLD mean", "median", "99.9 %", "same top 1",
            "first divergence", *spent, title=title,
        )  # fmt: skip
        for kld in run.kld:
            table.add_row(
                kld.mode, str(kld.n), str(kld.steps), f"{kld.kld_mean:.2e}", f"{kld.kld_median:.2e}",
                f"{kld.kld_p999:.2e}", f"{kld.same_top1:.1%}",
                f"{kld.first_divergence:.1f} ({kld.diverged:.0%} of texts)", *_bytes(kld),
            )  # fmt: skip
    Console().print(table)


def print_distances(rows: Sequence[CacheDistances]) -> None:
    """Print a row for each cache; where texts have several lengths, a table for each length too."""
    if not rows:
        return
    _print_distances([(row, row.all_texts) for row in rows], "all texts")
    if len(rows[0].by_context) > 1:
        for number, example in enumerate(rows[0].by_context):
            title = f"texts of {example.context} tokens"
            _print_distances([(row, row.by_context[number]) for row in rows], title)


def _print_distances(rows: Sequence[tuple[CacheDistances, Distance]], title: str) -> None:
    first = rows[0][1]
    full = f"full precision (float32) has perplexity {first.perplexity_full:.2f}"
    table = Table(
        Column("cache", overflow="fold"),
        *("bytes", "vs bf16", "mean KL", "99 %", "same", "ppl", "differs at"),
        title=f"{rows[0][0].model}, {title}: {first.n}, {first.steps} steps; {full}",
        caption="bytes: of a token, all layers; same: first choice of the next token; ppl: perplexity; "
        "differs at: tokens of an answer until one differs",
    )
    for row, distance in rows:
        table.add_row(
            row.cache,
            f"{row.bytes_per_token:,.0f}",
            f"{row.ratio_bf16:.2f}x",
            f"{distance.kld_mean:.4f}",
            f"{distance.kld_p99:.3f}",
            f"{distance.same_top1:.1%}",
            f"{distance.perplexity:.2f}",
            f"{distance.first_divergence:.0f} of {distance.steps // distance.n}",
        )
    Console().print(table)
