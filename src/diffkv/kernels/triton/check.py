"""Checks of tensor arguments, cheap enough for every call of a decode step: they touch no data."""

import torch
from torch import Tensor

__all__ = ["check_dtype", "check_layer", "check_packed", "check_tensor"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def check_layer(layer: int, num_layers: int) -> None:
    """Raise ValueError unless there is such a layer."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be in 0 .. {num_layers - 1}, got {layer}")
