"""Draws what each layer and head kept."""

from pathlib import Path

from diffkv.lab import plots
from diffkv.lab.rows import Row

__all__ = ["draw_heads"]

TIERS = ("high", "low", "dropped")


def draw_heads(path: Path, row: Row) -> None:
    """Draw the share of tokens of each tier that some token is in, by layer and KV head."""
    maps = []
    for tier in TIERS:
        shares: list[list[float]] = row["shares"].get(tier, [])
        if tier == "high" or any(map(any, shares)):
            cells = {
                (layer, head): share
                for layer, heads in enumerate(shares)
                for head, share in enumerate(heads)
            }
            columns, lines = ([str(i) for i in range(num)] for num in (len(shares[0]), len(shares)))
            maps.append(plots.HeatMap(tier, "KV head", "layer", columns, lines, cells, "share"))
    title = (
        f"{row['model']}: {row['quant']}, alpha_high {row['alpha_high']:g}, alpha_low "
        f"{row['alpha_low']:g}, {row['num_tokens']} tokens"
    )
    plots.heat_maps(path, [maps], title)
