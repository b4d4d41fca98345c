"""Checks of tensor arguments, cheap enough for every call of a decode step."""

import torch
from torch import Tensor

__all__ = ["check_layer", "check_packed", "check_tensor"]


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raise ValueError unless a tensor is contiguous, on the CPU, of that dtype and shape."""
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise ValueError(
            f"{name} must be a contiguous CPU tensor {list(shape)} {dtype}, got "
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        )


def check_packed(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Like `check_tensor` for [rows, heads, head_dim], where rows may be apart; bytes between them."""
    strides = tensor.stride()
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or strides[2] != 1
        or (strides[1] != shape[2] and shape[1] > 1)
        or not tensor.is_cpu
    ):
        raise ValueError(
            f"{name} must be a CPU tensor {list(shape)} {dtype}, each row contiguous, got "
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        )
    return strides[0] * dtype.itemsize


def check_layer(layer: int, num_layers: int) -> None:
    """Raise ValueError unless there is such a layer."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be in 0 .. {num_layers - 1}, got {layer}")
