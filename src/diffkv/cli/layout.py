"""`diffkv layout`: what a page of a quantisation configuration holds, and what a token costs."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from diffkv.cli.arguments import num_bytes
from diffkv.layout import PageLayout, bf16_bytes_per_token
from diffkv.quant import DEFAULT_QUANT, QuantConfig

__all__ = ["add_arguments", "describe", "run"]

DEFAULT_HEAD_DIM = 128
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
TIER_NAMES = ("high", "low")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--quant", default=DEFAULT_QUANT, help="formats, high-low or one (default: %(default)s)"
    )
    parser.add_argument(
        "--head-dim",
        type=int,
        default=DEFAULT_HEAD_DIM,
        help="elements of a key or value vector (default: %(default)s)",
    )
    parser.add_argument(
        "--page-bytes", type=num_bytes, help="bytes of a page (default: the size that wastes least)"
    )
    parser.add_argument(
        "--dtype",
        choices=ELEMENT_BYTES,
        default="bfloat16",
        help="the model's; 16-bit formats store it (default: %(default)s)",
    )
    parser.add_argument(
        "--drops",
        action="store_true",
        help="with sums and positions of every token, as alpha_low above 0 needs them",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Derive the layout and print it."""
    layout = PageLayout.derive(
        QuantConfig.parse(args.quant), args.head_dim, args.page_bytes, ELEMENT_BYTES[args.dtype],
        args.drops,
    )  # fmt: skip
    facts = describe(layout)
    print(json.dumps(facts) if args.json else _report(facts, args.dtype))
    return 0


def describe(layout: PageLayout) -> dict[str, Any]:
    """A layout as plain data: what `--json` prints."""
    return {
        "quant": str(layout.quant),
        "head_dim": layout.head_dim,
        "page_bytes": layout.page_bytes,
        "element_bytes": layout.element_bytes,
        "drops": layout.drops,
        "tiers": [_describe_tier(layout, tier) for tier in range(len(layout.tiers))],
    }


def _describe_tier(layout: PageLayout, tier: int) -> dict[str, Any]:
    placed = layout.tiers[tier]
    bf16_bytes = bf16_bytes_per_token(1, layout.head_dim)
    return {
        "tier": TIER_NAMES[tier],
        "format": str(placed.format),
        "tokens_per_page": placed.tokens_per_page,
        "bytes_per_token": layout.page_token_bytes(tier),
        "token_bytes": placed.token_bytes,
        "unused_share": placed.unused_share(layout.page_bytes),
        "ratio_bf16": layout.page_token_bytes(tier) / bf16_bytes,
        "nominal_ratio_bf16": (placed.k_code_bytes + placed.v_code_bytes) / bf16_bytes,
        "regions": {
            name: {"offset": offset, "bytes": num_bytes}
            for name, (offset, num_bytes) in placed.regions.items()
        },
    }


def _report(facts: dict[str, Any], dtype: str) -> str:
    """The facts as a heading and two tables."""
    tiers = facts["tiers"]
    costs = [
        ("tier", "format", "tokens/page", "bytes/token", "packed", "unused", "of bf16", "nominal")
    ]
    costs += [
        (
            tier["tier"],
            tier["format"],
            str(tier["tokens_per_page"]),
            f"{tier['bytes_per_token']:.1f}",
            str(tier["token_bytes"]),
            f"{tier['unused_share']:.1%}",
            f"{tier['ratio_bf16']:.1%}",
            f"{tier['nominal_ratio_bf16']:.1%}",
        )
        for tier in tiers
    ]
    places = [("region", *(f"{tier['tier']} {word}" for tier in tiers for word in ("at", "bytes")))]
    places += [
        (
            name,
            *(str(tier["regions"][name][fact]) for tier in tiers for fact in ("offset", "bytes")),
        )
        for name in tiers[0]["regions"]
    ]
    heading = (
        f"{facts['quant']} at head_dim {facts['head_dim']}, {dtype}: "
        f"pages of {facts['page_bytes']} bytes"
    )
    return "\n\n".join((heading, _table(costs, num_labels=2), _table(places, num_labels=1)))


def _table(rows: Sequence[Sequence[str]], num_labels: int) -> str:
    """Columns as wide as they need; the first `num_labels` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < num_labels else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
