"""What a prompt costs besides its own computation, beside vLLM's own prefill of the same length."""

from collections.abc import Sequence
from typing import Any

import torch

from diffkv.lab.bench import pool
from diffkv.lab.rows import Row, Writer

__all__ = ["add_shares"]

OPS = ("significance", "store_prompt")
"""Operations that every prompt needs, in all layers."""

STEPS = 12
"""Decode steps that `pool.measure` times; it times a quarter as many prompts."""


def add_shares(
    writer: Writer, mapped: Sequence[Row], config: dict[str, Any], quants: Sequence[str]
) -> None:
    """Add a row for each context and quant: the operations of a prompt over vLLM's prefill in bf16.

    Args:
        writer: gets the rows.
        mapped: rows of a map; prefill is that of the cell with the fewest requests.
        config: the model's `config.json`.
        quants: formats of DiffKV.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for ctx, prefill_ms in sorted(_stock_prefill_ms(mapped).items()):
        for quant in dict.fromkeys(quants):
            contents = _contents(config, ctx, quant)
            if not pool.fits(contents, device, writer):
                continue
            ms = {name: each.ms for name, each in pool.measure(contents, device, STEPS).items()}
            share = sum(ms[name] for name in OPS) / prefill_ms
            times = {f"{name}_ms": ms[name] for name in OPS}
            text = ", ".join(f"{name} {ms[name]:.1f} ms" for name in OPS)
            writer.add(
                "prompt",
                {"quant": quant, "ctx": ctx},
                {**times, "stock_prefill_ms": prefill_ms, "share": share},
                f"a prompt of {ctx} tokens, {quant}: {text}: {share:.1%} of vLLM's own prefill, "
                f"{prefill_ms:.0f} ms",
            )


def _stock_prefill_ms(rows: Sequence[Row]) -> dict[int, float]:
    """Milliseconds of one prompt of each context."""
    stock = [row for row in rows if row["engine"] == "stock bf16" and row.error is None]
    stock.sort(key=lambda row: -row["requests"])
    return {row["ctx"]: row["ctx"] / row["prefill_tokens_per_s"] * 1e3 for row in stock}


def _contents(config: dict[str, Any], ctx: int, quant: str) -> pool.Contents:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    return pool.Contents(
        quant,
        num_layers=config["num_hidden_layers"],
        num_kv_heads=kv_heads,
        num_requests=1,
        ctx=ctx,
        group=heads // kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
    )
