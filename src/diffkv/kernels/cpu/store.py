"""Store prompt tokens into pages, read them back, and release them."""

import torch
from torch import Tensor

from diffkv.kernels.check import check_index, check_read, check_tensor, check_tokens
from diffkv.kernels.cpu.library import CPU, check_status, handle
from diffkv.state import PoolState, PromptTokens

__all__ = ["gather", "release", "store_prompt"]


def store_prompt(
    state: PoolState, layer: int, tokens: PromptTokens, tiers: Tensor, sums: Tensor
) -> None:
    """Same contract as `reference.store_prompt`. Rows of key and value may be apart."""
    pool = handle(state)
    check_index("layer", layer, state.num_layers)
    key_stride, value_stride = check_tokens(state, tokens, tiers, sums, CPU)
    element = state.dtype.itemsize
    check_status(
        pool.library.store_prompt(
            pool.address, layer, tokens.slots.data_ptr(), tokens.cu_seqlens.data_ptr(),
            tokens.slots.numel(), tokens.key.data_ptr(), key_stride * element,
            tokens.value.data_ptr(), value_stride * element, tokens.positions.data_ptr(),
            tiers.data_ptr(), sums.data_ptr(), tokens.positions.numel(), torch.get_num_threads(),
        )
    )  # fmt: skip


def gather(
    state: PoolState,
    layer: int,
    slots: Tensor,
    starts: Tensor,
    key: Tensor,
    value: Tensor,
    tiers: Tensor,
) -> None:
    """Same contract as `reference.gather`. Rows of key and value may be apart.

    Raises:
        ValueError: a head keeps more than its row has a place for; nothing is written.
    """
    pool = handle(state)
    check_index("layer", layer, state.num_layers)
    key_stride, value_stride = check_read(state, slots, starts, key, value, tiers, CPU)
    element = state.dtype.itemsize
    check_status(
        pool.library.gather(
            pool.address, layer, slots.data_ptr(), starts.data_ptr(), slots.numel(), len(key),
            key.data_ptr(), key_stride * element, value.data_ptr(), value_stride * element,
            tiers.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip


def release(state: PoolState, slots: Tensor, layer: int) -> None:
    """Same contract as `reference.release`."""
    pool = handle(state)
    if layer >= 0:
        check_index("layer", layer, state.num_layers)
    check_tensor("slots", slots, CPU, torch.int32, slots.numel())
    check_status(
        pool.library.release(
            pool.address, slots.data_ptr(), slots.numel(), layer, torch.get_num_threads()
        )
    )
