"""Store prompt tokens into pages, read them back, and release them."""

import torch
from torch import Tensor

from diffkv.kernels.cpu.check import check_layer, check_packed, check_tensor
from diffkv.kernels.cpu.library import check_status, handle
from diffkv.state import PoolState, PromptTokens

__all__ = ["gather", "release", "store_prompt"]


def store_prompt(
    state: PoolState, layer: int, tokens: PromptTokens, tiers: Tensor, sums: Tensor
) -> None:
    """Same contract as `reference.store_prompt`. Rows of key and value may be apart."""
    pool = handle(state)
    num, heads = tokens.key.shape[0], pool.num_kv_heads
    num_requests = tokens.slots.numel()
    check_layer(layer, state.num_layers)
    check_tensor("tokens.slots", tokens.slots, torch.int32, num_requests)
    check_tensor("tokens.cu_seqlens", tokens.cu_seqlens, torch.int32, num_requests + 1)
    check_tensor("tokens.positions", tokens.positions, torch.int32, num)
    check_tensor("tiers", tiers, torch.int8, heads, num)
    check_tensor("sums", sums, torch.float32, heads, num)
    key_stride = check_packed("tokens.key", tokens.key, pool.dtype, num, heads, pool.head_dim)
    value_stride = check_packed("tokens.value", tokens.value, pool.dtype, num, heads, pool.head_dim)
    check_status(
        pool.library.store_prompt(
            pool.address, layer, tokens.slots.data_ptr(), tokens.cu_seqlens.data_ptr(),
            num_requests, tokens.key.data_ptr(), key_stride, tokens.value.data_ptr(), value_stride,
            tokens.positions.data_ptr(), tiers.data_ptr(), sums.data_ptr(), num,
            torch.get_num_threads(),
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
    check_layer(layer, state.num_layers)
    if not 0 <= slot < state.directory.shape[0]:
        raise ValueError(f"slot must be in 0 .. {state.directory.shape[0] - 1}, got {slot}")
    shape = (pool.num_kv_heads, max_tokens)
    key = torch.empty(*shape, pool.head_dim, dtype=pool.dtype)
    value = torch.empty(*shape, pool.head_dim, dtype=pool.dtype)
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
        check_layer(layer, state.num_layers)
    check_tensor("slots", slots, torch.int32, slots.numel())
    check_status(
        pool.library.release(
            pool.address, slots.data_ptr(), slots.numel(), layer, torch.get_num_threads()
        )
    )
