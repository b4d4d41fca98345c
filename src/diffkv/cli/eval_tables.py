"""What `eval` prints for people."""

from rich.console import Console
from rich.table import Table

from diffkv.lab.evaluation.results import Run, Use

__all__ = ["print_run"]


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
