"""Checks of the operations' arguments, cheap enough for every call of a decode step: no data is read."""

import torch
from torch import Tensor

from diffkv.quant import BITS
from diffkv.state import TENSORS, DecodePlan, PoolState, PromptTokens, sizes_of

__all__ = [
    "check_centring",
    "check_decided",
    "check_dtype",
    "check_format",
    "check_group",
    "check_index",
    "check_new_tokens",
    "check_packed",
    "check_read",
    "check_report",
    "check_scored",
    "check_state",
    "check_tensor",
    "check_tokens",
]

CENTRE_COLUMNS = 4
"""Slot, skipped tokens, row before, heir: see `reference.centre_rows`."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of a model."""


def check_tensor(
    name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype, *shape: int
) -> None:
    """Raise ValueError unless a tensor is contiguous, on that device, of that dtype and shape."""
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or tensor.device != device
    ):
        raise ValueError(
            f"{name} must be a contiguous tensor {list(shape)} {dtype} on {device}, got "
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        )


def check_packed(
    name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype, *shape: int
) -> int:
    """Like `check_tensor` for [rows, heads, head_dim] with rows apart: returns elements between them."""
    strides = tensor.stride()
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or strides[2] != 1
        or (strides[1] != shape[2] and shape[1] > 1)
        or tensor.device != device
    ):
        raise ValueError(
            f"{name} must be a tensor {list(shape)} {dtype} on {device}, each row contiguous, got "
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {strides}"
        )
    return strides[0]


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless it is a model's dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def check_format(dtype: torch.dtype, bits: int, groups: int, head_dim: int) -> None:
    """Raise ValueError unless vectors of such a dtype and length can have such codes."""
    check_dtype("dtype", dtype)
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits}")
    if head_dim <= 0 or head_dim % 8 or groups <= 0 or head_dim % groups:
        raise ValueError(
            f"head_dim must be a positive multiple of 8 and of groups, got {head_dim}, {groups}"
        )


def check_group(num_q_heads: int, num_kv_heads: int) -> int:
    """Query heads of a KV head; raises ValueError unless all have as many."""
    if num_q_heads % num_kv_heads or not num_q_heads:
        raise ValueError(f"query must have a multiple of {num_kv_heads} heads, got {num_q_heads}")
    return num_q_heads // num_kv_heads


def check_index(name: str, index: int, num: int) -> None:
    """Raise ValueError unless there is such a layer or slot."""
    if not 0 <= index < num:
        raise ValueError(f"{name} must be in 0 .. {num - 1}, got {index}")


def check_state(state: PoolState, device: torch.device) -> None:
    """Raise ValueError unless every tensor of a state is what `TENSORS` says, on that device."""
    check_dtype("state.dtype", state.dtype)
    if state.dtype.itemsize != state.layout.element_bytes:
        raise ValueError(
            f"state.layout must be derived for elements of {state.dtype.itemsize} bytes "
            f"({state.dtype}), got element_bytes {state.layout.element_bytes}"
        )
    centre_dim = state.layout.head_dim if state.layout.centred else 0
    if state.centre_dim != centre_dim:
        raise ValueError(
            f"state.centres must have {centre_dim} elements each (as state.layout says), "
            f"got {state.centre_dim}"
        )
    for name, spec in TENSORS.items():
        shape = sizes_of(spec.shape, state)
        check_tensor(f"state.{name}", getattr(state, name), device, spec.dtype, *shape)


def check_tokens(
    state: PoolState, tokens: PromptTokens, tiers: Tensor, sums: Tensor, device: torch.device
) -> tuple[int, int]:
    """Raise ValueError unless `store_prompt` can take them.

    Returns:
        Elements between the rows of the keys, and of the values.
    """
    num, heads, num_requests = tokens.key.shape[0], state.num_kv_heads, tokens.slots.numel()
    check_tensor("tokens.slots", tokens.slots, device, torch.int32, num_requests)
    check_tensor("tokens.cu_seqlens", tokens.cu_seqlens, device, torch.int32, num_requests + 1)
    check_tensor("tokens.positions", tokens.positions, device, torch.int32, num)
    check_tensor("tiers", tiers, device, torch.int8, heads, num)
    check_tensor("sums", sums, device, torch.float32, heads, num)
    shape = (num, heads, state.layout.head_dim)
    return (
        check_packed("tokens.key", tokens.key, device, state.dtype, *shape),
        check_packed("tokens.value", tokens.value, device, state.dtype, *shape),
    )


def check_read(
    state: PoolState,
    slots: Tensor,
    starts: Tensor,
    key: Tensor,
    value: Tensor,
    tiers: Tensor,
    device: torch.device,
) -> tuple[int, int]:
    """Raise ValueError unless `gather` can write them; returns strides as `check_tokens` does."""
    num, heads = key.shape[0], state.num_kv_heads
    check_tensor("slots", slots, device, torch.int32, slots.numel())
    check_tensor("starts", starts, device, torch.int32, slots.numel())
    check_tensor("tiers", tiers, device, torch.int8, heads, num)
    shape = (num, heads, state.layout.head_dim)
    return (
        check_packed("key", key, device, state.dtype, *shape),
        check_packed("value", value, device, state.dtype, *shape),
    )


def check_report(slots: Tensor, numbers: Tensor, device: torch.device) -> int:
    """Raise ValueError unless `report` can write them; returns the K of its contract."""
    num_rows, columns = slots.numel(), numbers.shape[-1]
    check_tensor("slots", slots, device, torch.int32, num_rows)
    check_tensor("numbers", numbers, device, torch.int64, 1 + num_rows, max(3, columns))
    return columns - 3


def check_new_tokens(
    state: PoolState, plan: DecodePlan, key: Tensor, value: Tensor, device: torch.device
) -> tuple[int, int]:
    """Raise ValueError unless `append` can take them; returns strides as `check_tokens` does."""
    num, heads = plan.slots.numel(), state.num_kv_heads
    check_tensor("plan.slots", plan.slots, device, torch.int32, num)
    check_tensor("plan.positions", plan.positions, device, torch.int32, num)
    places = (num, state.num_layers, heads, 4)
    check_tensor("plan.places", plan.places, device, torch.int32, *places)
    shape = (num, heads, state.layout.head_dim)
    return (
        check_packed("key", key, device, state.dtype, *shape),
        check_packed("value", value, device, state.dtype, *shape),
    )


def check_decided(
    sums: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor | None,
    page_tokens: Tensor,
    tiers: Tensor,
    device: torch.device,
) -> None:
    """Raise ValueError unless `decide_rows` can take them."""
    num = page_tokens.numel()
    check_tensor("page_tokens", page_tokens, device, torch.int32, num)
    check_tensor("cu_seqlens", cu_seqlens, device, torch.int32, num + 1)
    if bounds is not None:
        check_tensor("bounds", bounds, device, torch.float32, num, 2)
    check_tensor("sums", sums, device, torch.float32, *sums.shape[:1], *sums.shape[1:2])
    check_tensor("tiers", tiers, device, torch.int8, *sums.shape)


def check_centring(
    state: PoolState, rows: Tensor, cu_seqlens: Tensor, key: Tensor, device: torch.device
) -> int:
    """Raise ValueError unless `centre_rows` can take them; returns the elements between rows of keys."""
    if not state.centre_dim:
        raise ValueError("state must have centres: its layout has none")
    num = rows.shape[0]
    check_tensor("rows", rows, device, torch.int32, num, CENTRE_COLUMNS)
    check_tensor("cu_seqlens", cu_seqlens, device, torch.int32, num + 1)
    shape = (key.shape[0], state.num_kv_heads, state.layout.head_dim)
    return check_packed("key", key, device, state.dtype, *shape)


def check_scored(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_own: Tensor,
    num_own: int,
    lse: Tensor | None,
    device: torch.device,
) -> tuple[int, int, int]:
    """Raise ValueError unless `significance` can take them.

    Returns:
        Elements between the rows of the queries, of the keys, and of `lse`.
    """
    num_requests = cu_seqlens_k.numel() - 1
    check_dtype("key", key.dtype)
    check_group(query.shape[1], key.shape[1])
    check_tensor("cu_seqlens_q", cu_seqlens_q, device, torch.int32, num_requests + 1)
    check_tensor("cu_seqlens_k", cu_seqlens_k, device, torch.int32, num_requests + 1)
    check_tensor("cu_seqlens_own", cu_seqlens_own, device, torch.int32, num_requests + 1)
    if not 0 <= num_own <= key.shape[0]:
        raise ValueError(
            f"num_own must be 0 to the number of tokens, {key.shape[0]}, got {num_own}"
        )
    q_shape = (query.shape[0], query.shape[1], key.shape[2])
    lse_stride = 0
    if lse is not None:
        one_head = lse[:, None]
        shape = (query.shape[1], 1, query.shape[0])
        lse_stride = check_packed("lse", one_head, device, torch.float32, *shape)
    return (
        check_packed("query", query, device, key.dtype, *q_shape),
        check_packed("key", key, device, key.dtype, *key.shape),
        lse_stride,
    )
