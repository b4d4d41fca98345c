"""What `eval` prints for people."""

from rich.console import Console
from rich.table import Table

from diffkv.lab.evaluation.results import KldScore, Method, Score, TaskScore, scores
from diffkv.lab.rows import Row

__all__ = ["print_row"]

TASK = ("task", "setting", "n", "accuracy", "full precision", "difference, 95 %")
MODE = ("mode", "texts", "steps", "KLD mean", "median", "99.9 %", "same top 1", "first divergence")
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


def _mode(score: KldScore) -> tuple[str, ...]:
    distances = (f"{kld:.2e}" for kld in (score.kld_mean, score.kld_median, score.kld_p999))
    divergence = f"{score.first_divergence:.1f} ({score.diverged:.0%} of texts)"
    counts = str(score.n), str(score.steps)
    return score.mode, *counts, *distances, f"{score.same_top1:.1%}", divergence


def print_row(row: Row) -> None:
    """Print one table."""
    method, found = Method.of(row), scores(row)
    are_tasks = isinstance(found[0], TaskScore)
    title = f"{method.model}, {method.label()}, seed {row.get('seed', 0)}"
    table = Table(*(TASK if are_tasks else MODE), *SPENT, title=title)
    for score in found:
        table.add_row(*(_task(score) if are_tasks else _mode(score)), *_spent(score))
    Console().print(table)
