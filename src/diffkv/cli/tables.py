"""What `generate` prints for people."""

from rich.console import Console
from rich.table import Table

from diffkv.vllm_plugin.front.offline import CacheUse, Result

__all__ = ["print_result"]

SHOWN_CHARACTERS = 48


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _verdict(same: bool) -> str:
    return "[green]same[/green]" if same else "[red]differs[/red]"


def print_result(answers: list[str | None], ours: Result, stock: Result | None) -> None:
    """Print a row for each prompt, then what the cache spent.

    Args:
        answers: the answer that is known to be right for each prompt, or None.
        ours: with DiffKV.
        stock: with vLLM's own cache, if it was asked for.
    """
    console = Console()
    table = Table("prompt tokens", "answer with DiffKV")
    if stock is not None:
        table.add_column("vLLM's own cache")
    known = any(answer is not None for answer in answers)
    if known:
        table.add_column("right")
    for i, (answer, right) in enumerate(zip(ours.answers, answers, strict=True)):
        row = [str(answer.prompt_tokens), _short(answer.text)]
        if stock is not None:
            row.append(_verdict(answer.token_ids == stock.answers[i].token_ids))
        if known:
            is_right = right is not None and answer.text.split() == right.split()
            row.append("yes" if is_right else "no" if right is not None else "")
        table.add_row(*row)
    console.print(table)
    if ours.cache is not None:
        console.print(_cache_table(ours.cache, ours.preemptions))
    if stock is not None:
        pairs = zip(ours.answers, stock.answers, strict=True)
        same = sum(a.token_ids == b.token_ids for a, b in pairs)
        console.print(f"{same} of {len(ours.answers)} answers equal those of vLLM's own cache.")


def _cache_table(use: CacheUse, preemptions: int) -> Table:
    table = Table("KV cache", use.quant, title="tokens: mean over heads, when requests end")
    share = 100 / use.tokens
    rows = (
        ("alpha_high, alpha_low", f"{use.alpha_high:g}, {use.alpha_low:g}"),
        ("tokens", f"{use.tokens}"),
        ("high, low, dropped", f"{use.high:.0f}, {use.low:.0f}, {use.dropped:.0f}"),
        ("", f"{use.high * share:.1f} %, {use.low * share:.1f} %, {use.dropped * share:.1f} %"),
        ("pages, at the peak", f"{use.pages}, {use.pages_peak} of {use.page_bytes} B"),
        ("requests at once", f"{use.running_peak}, {preemptions} preemptions"),
        (
            "bytes a token, all layers",
            f"{use.bytes_per_token:.0f} (bf16 {use.bf16_bytes_per_token})",
        ),
        (
            "smaller than bf16",
            f"{use.ratio_bf16:.2f}x (nominal bits: {use.nominal_ratio_bf16:.2f}x)",
        ),
        ("smaller than fp8", f"{use.ratio_fp8:.2f}x"),
    )
    for row in rows:
        table.add_row(*row)
    return table
