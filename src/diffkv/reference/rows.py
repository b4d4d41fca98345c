"""What complete rows of prompts are stored with: tiers of their tokens, and a centre of their keys."""

import torch
from torch import Tensor

from diffkv.policy import SCORED_QUERIES, fill_pages, tiers_by_bounds
from diffkv.state import PoolState

__all__ = ["centre_rows", "decide_rows"]


def decide_rows(
    sums: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor | None,
    page_tokens: Tensor,
    window: int,
    scored_queries: int,
    tiers: Tensor,
) -> None:
    """Sort the tokens of complete rows into tiers by their means, and fill the last high pages.

    A token's mean is its sum over the scoring queries that saw it: min(those from it to the end of its
    row, scored_queries). Each row is decided by `policy.tiers_by_bounds`, then `policy.fill_pages`. What
    else is in the batch does not change a row.

    Args:
        sums: [num_kv_heads, N] float32, as `significance` returns them. Where `scored_queries` is not
            `SCORED_QUERIES` they change to mean times min(queries from the token on, SCORED_QUERIES), so
            that decode, which divides by that, finds the mean.
        cu_seqlens: [R + 1] int32, where each row's tokens start; the last entry is N.
        bounds: [R, 2] float32, least means of high and of low tokens; None: `tiers` has been decided.
        page_tokens: [R] int32, tokens of a high page where a row's last one is filled, else 0.
        window: last tokens of each row that are high.
        scored_queries: queries that scored each row, at most.
        tiers: [num_kv_heads, N] int8, written; read first where there are no bounds.
    """
    starts = cu_seqlens.tolist()
    for r, num in enumerate(page_tokens.tolist()):
        row = slice(starts[r], starts[r + 1])
        from_end = torch.arange(row.stop - row.start, 0, -1, device=sums.device)
        means = sums[:, row] / from_end.clamp(max=scored_queries).float()
        if bounds is not None:
            tiers[:, row] = tiers_by_bounds(means, bounds[r, 0], bounds[r, 1], window)
        if num:
            fill_pages(tiers[:, row], means, num)
        if scored_queries != SCORED_QUERIES:
            sums[:, row] = means * from_end.clamp(max=SCORED_QUERIES).float()


def centre_rows(
    state: PoolState, layer: int, rows: Tensor, cu_seqlens: Tensor, key: Tensor
) -> None:
    """Note the centre of complete rows: the mean of each head's keys, rounded to bfloat16 once.

    The order in which keys are added is the device's own, and the same whatever else is in the batch.

    Args:
        state: has centres, which change.
        layer: number of the layer.
        rows: [R, 4] int32, of each row: its slot; how many of its first tokens do not count; another
            row, whose centre it takes instead of a mean, or -1; a row that begins empty and gets the
            same centre, or -1. No row is named twice, but as the one before several.
        cu_seqlens: [R + 1] int32, where each row's tokens start; the last entry is N.
        key: [N, num_kv_heads, head_dim], the model's dtype, as the rows' keys would be stored.
    """
    starts = cu_seqlens.tolist()
    for r, (slot, skipped, before, heir) in enumerate(rows.tolist()):
        counted = key[starts[r] + skipped : starts[r + 1]]
        mean = counted.double().sum(0) / max(len(counted), 1)
        centre = state.centres[before, layer] if before >= 0 else mean.to(state.centres.dtype)
        state.centres[slot, layer] = centre
        if heir >= 0:
            state.centres[heir, layer] = centre
