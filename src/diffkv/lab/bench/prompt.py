"""What a prompt costs besides its own computation, beside vLLM's own prefill of the same length."""

from collections.abc import Sequence
from typing import Any

import torch

from diffkv.lab.bench import manager
from diffkv.lab.bench.facts import Rows, available_bytes

__all__ = ["add_shares"]

OPS = ("significance", "store_prompt")
"""Operations that every prompt needs, in all layers."""

STEPS = 12
"""Of `manager.measure`; a quarter of them are prompts."""


def add_shares(rows: Rows, config: dict[str, Any], quants: Sequence[str]) -> None:
    """Add a row for each context and quant: the operations of a prompt over vLLM's prefill in bf16.

    Args:
        rows: of the map; prefill is that of the cell with the fewest requests.
        config: of the model.
        quants: formats of DiffKV.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for ctx, prefill_ms in sorted(_stock_prefill_ms(rows.rows).items()):
        for quant in dict.fromkeys(quants):
            load = _load(config, ctx, quant)
            if load.needed_bytes() > manager.MAX_MEMORY_SHARE * available_bytes(device):
                rows.note(f"{load}: skipped, needs {load.needed_bytes() / 1e9:.1f} GB")
                continue
            ms = manager.measure(load, device, STEPS).medians()
            share = sum(ms[name] for name in OPS) / prefill_ms
            times = {f"{name}_ms": ms[name] for name in OPS}
            row = {"op": "prompt", "quant": quant, "ctx": ctx, **times}
            text = ", ".join(f"{name} {ms[name]:.1f} ms" for name in OPS)
            rows.add(
                {**row, "stock_prefill_ms": prefill_ms, "share": share},
                f"a prompt of {ctx} tokens, {quant}: {text}: {share:.1%} of vLLM's own prefill, "
                f"{prefill_ms:.0f} ms",
            )


def _stock_prefill_ms(rows: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Of one prompt of each context."""
    stock = [row for row in rows if row.get("engine") == "stock bf16" and "error" not in row]
    stock.sort(key=lambda row: -row["requests"])
    return {row["ctx"]: row["ctx"] / row["prefill_tokens_per_s"] * 1e3 for row in stock}


def _load(config: dict[str, Any], ctx: int, quant: str) -> manager.Load:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    return manager.Load(
        num_layers=config["num_hidden_layers"], num_kv_heads=kv_heads, num_requests=1, ctx=ctx,
        group=heads // kv_heads, quant=quant,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
    )  # fmt: skip
