"""What complete rows of prompts are stored with: tiers of their tokens, and a centre of their keys."""

import torch
from torch import Tensor

from diffkv.kernels.check import check_centring, check_decided, check_index
from diffkv.kernels.cpu.library import CPU, check_status, handle, vectors_library
from diffkv.policy import SCORED_QUERIES
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
    """Same contract as `reference.decide_rows`."""
    check_decided(sums, cu_seqlens, bounds, page_tokens, tiers, CPU)
    vectors_library().decide_rows(
        sums.data_ptr(), cu_seqlens.data_ptr(), page_tokens.numel(),
        None if bounds is None else bounds.data_ptr(), page_tokens.data_ptr(), window,
        scored_queries, SCORED_QUERIES, tiers.data_ptr(), *sums.shape, torch.get_num_threads(),
    )  # fmt: skip


def centre_rows(
    state: PoolState, layer: int, rows: Tensor, cu_seqlens: Tensor, key: Tensor
) -> None:
    """Same contract as `reference.centre_rows`. Rows of the keys may be apart."""
    pool = handle(state)
    check_index("layer", layer, state.num_layers)
    key_stride = check_centring(state, rows, cu_seqlens, key, CPU)
    check_status(
        pool.library.centre_rows(
            pool.address, layer, rows.data_ptr(), cu_seqlens.data_ptr(), len(rows),
            key.data_ptr(), key_stride * key.element_size(), torch.get_num_threads(),
        )
    )  # fmt: skip
