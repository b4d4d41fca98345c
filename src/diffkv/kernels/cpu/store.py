"""Store prompt tokens into pages, read them back, and release them."""

import torch
from torch import Tensor

from diffkv.kernels.check import check_index, check_tensor, check_tokens
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
    state: PoolState, layer: int, slot: int, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same contract as `reference.gather`.

    Raises:
        ValueError: a head keeps more than `max_tokens`.
    """
    pool = handle(state)
    check_index("layer", layer, state.num_layers)
    check_index("slot", slot, state.num_slots)
    shape = (state.num_kv_heads, max_tokens)
    key = torch.empty(*shape, state.layout.head_dim, dtype=state.dtype)
    value = torch.empty_like(key)
    positions = torch.empty(shape, dtype=torch.int32)
    tiers = torch.empty(shape, dtype=torch.int8)
    check_status(
        pool.library.gather(
            pool.address, layer, slot, max_tokens, key.data_ptr(), value.data_ptr(),
            positions.data_ptr(), tiers.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return key, value, positions, tiers


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
