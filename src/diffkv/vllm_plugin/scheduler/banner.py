"""What an engine says of its cache when it starts."""

from typing import Any

from diffkv.layout import LayerGroup
from diffkv.quant import layers_text
from diffkv.shape import CacheShape
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.scheduler.estimate import why_worst_case

__all__ = ["banner", "bf16_bytes_per_token"]


TIERS = ("high", "low")


def _tiers(group: LayerGroup, num_kv_heads: int) -> str:
    """What a page of a group of layers holds, and what a token costs in all of them."""
    heads = len(group.layers) * num_kv_heads
    return ", ".join(
        f"{name} {tier.format}: {tier.tokens_per_page} tokens a page, "
        f"{heads * group.page.page_token_bytes(i):.0f} B a token"
        for i, (name, tier) in enumerate(zip(TIERS, group.page.tiers, strict=False))
    )


def bf16_bytes_per_token(shape: CacheShape) -> int:
    """Bytes of a token's keys and values in bf16, all layers and KV heads of a rank."""
    return shape.num_layers * shape.num_kv_heads * shape.layout.head_dim * 2 * 2


def banner(options: Options, shape: CacheShape, vllm_config: Any) -> list[str]:
    """Lines: configuration, bytes, capacity against bf16, and what is off and why."""
    layout, thresholds = shape.layout, options.thresholds()
    heads = shape.num_kv_heads
    budget = shape.num_pages * layout.page_bytes + shape.table_bytes
    bf16 = bf16_bytes_per_token(shape)
    names = TIERS if layout.quant.has_low else TIERS[:1]
    capacity = ", ".join(
        f"{layout.num_fitting(shape.num_pages // heads, i)} all {name}"
        for i, name in enumerate(names)
    )
    if len(layout.groups) == 1:
        tiers = _tiers(layout.groups[0], heads)
    else:
        tiers = ", ".join(
            f"all {name}: {heads * layout.page_token_bytes(i):.0f} B a token"
            for i, name in enumerate(names)
        )
    lines = [
        f"DiffKV {layout.quant}: alpha_high {thresholds.alpha_high:g}, alpha_low "
        f"{thresholds.alpha_low:g}, window {options.window}, policy {options.policy}, "
        f"rotation {options.rotation()}, kernels "
        f"{options.kernels or vllm_config.device_config.device_type}",
        f"DiffKV pages of {layout.page_bytes} B ({tiers}; bf16 {bf16} B a token)",
        f"DiffKV capacity in tokens: {capacity}, {budget // bf16} in bf16 of the same "
        f"{budget} B ({shape.table_bytes} B of them tables)",
    ]
    if len(layout.groups) > 1:
        lines += [
            f"DiffKV layers {layers_text(group.layers)}: {_tiers(group, heads)}"
            for group in layout.groups
        ]
    reason = why_worst_case(vllm_config, options)
    lines.append(
        "DiffKV admits prompts by their expected compressed size"
        if reason is None
        else f"DiffKV admits prompts by their worst case: {reason}"
    )
    if vllm_config.cache_config.enable_prefix_caching:
        lines.append("DiffKV: prefix caching is off, since heads keep different tokens")
    return lines
