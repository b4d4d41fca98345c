"""What `inspect` shows: shares of layers and heads as heat-maps, tiers of tokens as coloured text."""

from html import escape

from diffkv.lab.rows import Row

__all__ = ["print_maps", "tokens_html"]

TIERS = ("high", "low", "dropped")
"""In the order of their digits."""

COLOURS = ("#9ecae1", "#fdd49e", "#f4f4f4")
RAMP = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
"""Colours of 0, a half and 1: matplotlib's Blues."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.7 monospace; margin: 2em; color: #222; background: #fff; }}
span {{ padding: 1px 2px; margin: 0 1px; border-radius: 3px; white-space: pre-wrap; }}
.t0 {{ background: {high}; }} .t1 {{ background: {low}; }}
.t2 {{ background: {dropped}; color: #999; text-decoration: line-through; }}
</style></head><body>
<h1>{title}</h1>
<p>{facts}</p>
<p>{legend}</p>
<p>
{tokens}
</p></body></html>
"""


def _shown(row: Row) -> list[str]:
    """Tiers that some token is in; high always."""
    return [tier for tier in TIERS if tier == "high" or row["mean"][tier] > 0]


def _colour(share: float) -> tuple[int, int, int]:
    """Between the colours of the ramp."""
    start, position = min(int(share * 2), 1), share * 2
    low, high = RAMP[start], RAMP[start + 1]
    red, green, blue = (
        round(a + (b - a) * (position - start)) for a, b in zip(low, high, strict=True)
    )
    return red, green, blue


def _title(row: Row) -> str:
    return (
        f"{row['quant']}, alpha_high {row['alpha_high']:g}, alpha_low {row['alpha_low']:g}, "
        f"window {row['window']}: {len(row['prompts'])} prompts, {row['num_tokens']} tokens"
    )


def print_maps(row: Row) -> None:
    """A row for each layer, a column for each KV head, percent of the tokens, for each tier."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(_title(row))
    for tier in _shown(row):
        console.print(f"\n{tier}, % of tokens (mean {row['mean'][tier] * 100:.1f})")
        table = Table("layer", *(f"head {head}" for head in range(row["num_kv_heads"])))
        for layer, heads in enumerate(row["shares"][tier]):
            cells = []
            for share in heads:
                red, green, blue = _colour(share)
                ink = "black" if green > 128 else "white"
                style = f"{ink} on rgb({red},{green},{blue})"
                cells.append(Text(f"{share * 100:5.1f}", style=style))
            table.add_row(str(layer), *cells)
        console.print(table)


def tokens_html(row: Row, layer: int, head: int, texts: list[str], tiers: str) -> str:
    """A page that needs nothing else: each token of a prompt, coloured by its tier in one head.

    Args:
        row: a row that `inspect` wrote.
        layer: the head's.
        head: the KV head.
        texts: the tokens'.
        tiers: a digit for each token: 0 high, 1 low, 2 dropped.
    """
    counts = [tiers.count(str(tier)) for tier in range(len(TIERS))]
    legend = " ".join(
        f'<span class="t{tier}">{name}: {count}</span>'
        for tier, (name, count) in enumerate(zip(TIERS, counts, strict=True))
    )
    tokens = "\n".join(
        f'<span class="t{tier}" title="{position}: {TIERS[int(tier)]}">{escape(text)}</span>'
        for position, (text, tier) in enumerate(zip(texts, tiers, strict=True))
    )
    return PAGE.format(
        title=f"{escape(row['model'])}: layer {layer}, KV head {head}",
        facts=escape(
            f"{row['quant']}, alpha_high {row['alpha_high']:g}, alpha_low "
            f"{row['alpha_low']:g}, window {row['window']}: {len(texts)} tokens"
        ),
        legend=legend, tokens=tokens, high=COLOURS[0], low=COLOURS[1], dropped=COLOURS[2],
    )  # fmt: skip
