"""What `generate` prints for people."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffkv.vllm_plugin.front.offline import Answer, Result

__all__ = ["print_result", "short"]

SHOWN_CHARACTERS = 48


def short(text: str, most: int) -> str:
    """At most so many characters of a model's answer, on one line, and none of them markup."""
    text = " ".join(text.split())
    return escape(text if len(text) <= most else text[: most - 1] + "…")


def _verdict(same: bool) -> str:
    return "[green]same[/green]" if same else "[red]differs[/red]"


def print_result(
    right: Sequence[str | None],
    ours: Sequence[Answer],
    cache: dict[str, Any],
    stock: Result | None,
) -> None:
    """Print a row for each prompt, then what the cache spent.

    Args:
        right: the answer that is known to be right for each prompt, or None.
        ours: answers with DiffKV.
        cache: what its cache held, as `generate --json` says it.
        stock: with vLLM's own cache, if it was asked for.
    """
    console = Console()
    table = Table("prompt tokens", "answer with DiffKV")
    if stock is not None:
        table.add_column("vLLM's own cache")
    known = any(answer is not None for answer in right)
    if known:
        table.add_column("right")
    for i, (answer, best) in enumerate(zip(ours, right, strict=True)):
        row = [str(answer.prompt_tokens), short(answer.text, SHOWN_CHARACTERS)]
        if stock is not None:
            row.append(_verdict(answer.token_ids == stock.answers[i].token_ids))
        if known:
            is_right = best is not None and answer.text.split() == best.split()
            row.append("yes" if is_right else "no" if best is not None else "")
        table.add_row(*row)
    console.print(table)
    console.print(_cache_table(cache))
    if stock is not None:
        same = sum(a.token_ids == b.token_ids for a, b in zip(ours, stock.answers, strict=True))
        console.print(f"{same} of {len(ours)} answers equal those of vLLM's own cache.")


def _cache_table(cache: dict[str, Any]) -> Table:
    table = Table("KV cache", cache["quant"], title="tokens: mean over heads, when requests end")
    counts = [cache[name] for name in ("high", "low", "dropped")]
    rows = (
        ("alpha_high, alpha_low", f"{cache['alpha_high']:g}, {cache['alpha_low']:g}"),
        ("tokens", str(cache["tokens"])),
        ("high, low, dropped", ", ".join(f"{num:.0f}" for num in counts)),
        ("", ", ".join(f"{100 * num / cache['tokens']:.1f} %" for num in counts)),
        (
            "pages, at the peak",
            f"{cache['pages']}, {cache['pages_peak']} of {cache['page_bytes']} B",
        ),
        ("requests at once", f"{cache['running_peak']}, {cache['preemptions']} preemptions"),
        (
            "bytes a token, all layers",
            f"{cache['bytes_per_token']:.0f} (bf16 {cache['bf16_bytes_per_token']})",
        ),
        (
            "smaller than bf16",
            f"{cache['ratio_bf16']:.2f}x (nominal bits: {cache['nominal_ratio_bf16']:.2f}x)",
        ),
        ("smaller than fp8", f"{cache['ratio_fp8']:.2f}x"),
    )
    for row in rows:
        table.add_row(*row)
    return table
