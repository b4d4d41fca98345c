"""A decode step: plan where new tokens go, write them, attend."""

import torch
from torch import Tensor

from diffkv.kernels.cpu.check import check_layer, check_packed, check_tensor
from diffkv.kernels.cpu.library import attend_function, check_status, handle
from diffkv.state import DecodePlan, PoolState

__all__ = ["append", "attend", "plan_decode"]


def plan_decode(state: PoolState, slots: Tensor, seq_lens: Tensor) -> DecodePlan:
    """Same contract as `reference.plan_decode`."""
    pool = handle(state)
    num_requests = slots.numel()
    check_tensor("slots", slots, torch.int32, num_requests)
    check_tensor("seq_lens", seq_lens, torch.int32, num_requests)
    shape = (num_requests, state.num_layers, pool.num_kv_heads, 4)
    places = torch.empty(shape, dtype=torch.int32)
    check_status(
        pool.library.plan_decode(
            pool.address, slots.data_ptr(), seq_lens.data_ptr(), num_requests, places.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return DecodePlan(slots, seq_lens - 1, places)


def append(state: PoolState, layer: int, plan: DecodePlan, key: Tensor, value: Tensor) -> None:
    """Same contract as `reference.append`. Rows of key and value may be apart."""
    pool = handle(state)
    slots, positions, places = plan.slots, plan.positions, plan.places
    num_requests, num_layers = slots.numel(), state.num_layers
    check_layer(layer, num_layers)
    check_tensor("plan.slots", slots, torch.int32, num_requests)
    check_tensor("plan.positions", positions, torch.int32, num_requests)
    check_tensor("plan.places", places, torch.int32, num_requests, num_layers, pool.num_kv_heads, 4)
    shape = (num_requests, pool.num_kv_heads, pool.head_dim)
    key_stride = check_packed("key", key, pool.dtype, *shape)
    value_stride = check_packed("value", value, pool.dtype, *shape)
    pool.library.append(
        pool.address, layer, slots.data_ptr(), positions.data_ptr(), places.data_ptr(),
        num_requests, key.data_ptr(), key_stride, value.data_ptr(), value_stride,
        torch.get_num_threads(),
    )  # fmt: skip


def attend(
    state: PoolState, layer: int, slots: Tensor, query: Tensor, scale: float, output: Tensor
) -> None:
    """Same contract as `reference.attend`. Rows of query and output may be apart."""
    pool = handle(state)
    num_requests, num_q_heads = query.shape[:2]
    check_layer(layer, state.num_layers)
    check_tensor("slots", slots, torch.int32, num_requests)
    if num_q_heads % pool.num_kv_heads or not num_q_heads:
        raise ValueError(
            f"query must have a multiple of {pool.num_kv_heads} heads, got {num_q_heads}"
        )
    query_stride = check_packed(
        "query", query, pool.dtype, num_requests, num_q_heads, pool.head_dim
    )
    output_stride = check_packed(
        "output", output, pool.dtype, num_requests, num_q_heads, pool.head_dim
    )
    attend_group = attend_function(state, pool, num_q_heads // pool.num_kv_heads)
    attend_group(
        pool.address, layer, slots.data_ptr(), num_requests, query.data_ptr(), query_stride,
        output.data_ptr(), output_stride, scale, torch.get_num_threads(),
    )  # fmt: skip
