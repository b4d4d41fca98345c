"""What an engine says of its cache when it starts."""

from typing import Any

from diffkv.shape import PoolShape
from diffkv.vllm_plugin.division import Division
from diffkv.vllm_plugin.options import WORST_CASE, Options

__all__ = ["banner"]


TIERS = ("high", "low")


def banner(
    options: Options, shape: PoolShape, vllm_config: Any, division: Division | None = None
) -> list[str]:
    """Lines: configuration, bytes, capacity against bf16, and what is off and why."""
    layout, thresholds = shape.layout, options.thresholds()
    budget = shape.num_pages * layout.page_bytes + shape.table_bytes
    bf16 = shape.bf16_bytes_per_token
    tiers = list(zip(TIERS, layout.tiers, strict=False))
    costs = ", ".join(
        f"{name} {tier.format}: {tier.tokens_per_page} tokens a page, "
        f"{shape.num_heads * layout.page_token_bytes(i):.0f} B a token"
        for i, (name, tier) in enumerate(tiers)
    )
    capacity = ", ".join(
        f"{shape.num_pages // shape.num_heads * tier.tokens_per_page} all {name}"
        for name, tier in tiers
    )
    lines = [
        f"DiffKV {layout.quant}: alpha_high {thresholds.alpha_high:g}, alpha_low "
        f"{thresholds.alpha_low:g}, window {options.window}, policy {options.policy}, "
        f"rotation {options.rotation()}, kernels "
        f"{options.kernels or vllm_config.device_config.device_type}",
        f"DiffKV pages of {layout.page_bytes} B ({costs}; bf16 {bf16} B a token)",
        f"DiffKV capacity in tokens: {capacity}, {budget // bf16} in bf16 of the same "
        f"{budget} B ({shape.table_bytes} B of them tables)",
    ]
    lines.append(f"DiffKV admits prompts by {_admission(options, vllm_config.scheduler_config)}")
    if division is not None:
        lines.append(
            f"DiffKV divides the KV memory: {division.pool_bytes} B for the {division.num_layers} "
            f"layers with full attention, {division.blocks_bytes} B in {division.num_blocks} blocks of "
            f"vLLM's own cache for the {division.num_others} others"
        )
    caching = vllm_config.cache_config.enable_prefix_caching
    if shape.segment:
        rows = f"{shape.num_slots} rows, a prompt's of {shape.segment} tokens"
        off = (
            "off, since caches of two kinds would not end at the same tokens" if division else "off"
        )
        lines.append(f"DiffKV: {rows}; prefix caching is {'on' if caching else off}")
    elif caching:
        lines.append("DiffKV: prefix caching is off, since prompts are decided whole (--segment 0)")
    return lines


def _admission(options: Options, scheduler: Any) -> str:
    if not scheduler.scheduler_reserve_full_isl:
        return "what their first step needs: --no-scheduler-reserve-full-isl"
    if options.admission == WORST_CASE:
        return f"their worst case: --admission {WORST_CASE}"
    return "their expected compressed size"
