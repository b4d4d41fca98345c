"""A decode step: plan where new tokens go, write them, attend."""

import torch
from torch import Tensor

from diffkv.kernels.check import (
    check_group,
    check_index,
    check_new_tokens,
    check_packed,
    check_tensor,
)
from diffkv.kernels.cpu.library import CPU, attend_function, check_status, handle
from diffkv.kernels.cpu.rotate import rotate, rotated
from diffkv.state import DecodePlan, NewTokens, PoolState

__all__ = ["append", "attend", "plan_decode"]


def plan_decode(state: PoolState, slots: Tensor, seq_lens: Tensor) -> DecodePlan:
    """Same contract as `reference.plan_decode`."""
    pool = handle(state)
    num_requests = slots.numel()
    check_tensor("slots", slots, CPU, torch.int32, num_requests)
    check_tensor("seq_lens", seq_lens, CPU, torch.int32, num_requests)
    shape = (num_requests, state.num_layers, state.num_kv_heads, 4)
    places = torch.empty(shape, dtype=torch.int32)
    check_status(
        pool.library.plan_decode(
            pool.address, slots.data_ptr(), seq_lens.data_ptr(), num_requests, places.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return DecodePlan(slots, seq_lens - 1, places)


def append(
    state: PoolState,
    layer: int,
    plan: DecodePlan,
    key: Tensor,
    value: Tensor,
    signs: Tensor | None = None,
) -> None:
    """Same contract as `reference.append`. Rows of key and value may be apart."""
    pool = handle(state)
    if signs is not None:
        key, value = rotated(key, signs), rotated(value, signs)
    check_index("layer", layer, state.num_layers)
    key_stride, value_stride = check_new_tokens(state, plan, key, value, CPU)
    element = state.dtype.itemsize
    pool.library.append(
        pool.address, layer, plan.slots.data_ptr(), plan.positions.data_ptr(),
        plan.places.data_ptr(), plan.slots.numel(), key.data_ptr(), key_stride * element,
        value.data_ptr(), value_stride * element, torch.get_num_threads(),
    )  # fmt: skip


def attend(
    state: PoolState,
    layer: int,
    slots: Tensor,
    query: Tensor,
    scale: float,
    output: Tensor,
    signs: Tensor | None = None,
    new: NewTokens | None = None,
) -> None:
    """Same contract as `reference.attend`. Rows of query and output may be apart."""
    if new is not None:
        append(state, layer, new.plan, new.key, new.value, signs)
    pool = handle(state)
    if signs is not None:
        query = rotated(query, signs)
    num_requests, num_q_heads = query.shape[:2]
    check_index("layer", layer, state.num_layers)
    group = check_group(num_q_heads, state.num_kv_heads)
    check_tensor("slots", slots, CPU, torch.int32, num_requests)
    shape, element = (num_requests, num_q_heads, state.layout.head_dim), state.dtype.itemsize
    query_stride = check_packed("query", query, CPU, state.dtype, *shape)
    output_stride = check_packed("output", output, CPU, state.dtype, *shape)
    attend_function(state, pool, group)(
        pool.address, layer, slots.data_ptr(), num_requests,
        query.data_ptr(), query_stride * element, output.data_ptr(), output_stride * element,
        scale, torch.get_num_threads(),
    )  # fmt: skip
    if signs is not None:
        rotate(output, signs, True, output)
