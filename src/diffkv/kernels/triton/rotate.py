"""Rotate vectors, and turn them back: by a product, which tensor cores do faster than sums."""

import functools

import torch
from torch import Tensor

from diffkv.rotation import block_size, hadamard_blocks

__all__ = ["rotate"]


@functools.cache
def _signs_of_blocks(head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of 1, -1 and 0, which every dtype holds exactly. Kept, for CUDA graphs read it again."""
    return hadamard_blocks(head_dim).sign().to(device, dtype)


def rotate(x: Tensor, signs: Tensor, inverse: bool, out: Tensor) -> None:
    """Same contract as `reference.rotate`; sums of 16-bit vectors are rounded before they are scaled."""
    head_dim = x.shape[-1]
    blocks, flips = _signs_of_blocks(head_dim, x.device, x.dtype), signs.to(x.dtype)
    norm = block_size(head_dim) ** -0.5
    if inverse:
        out.copy_((x @ blocks).mul_(norm).mul_(flips))
    else:
        out.copy_(((x * flips) @ blocks).mul_(norm))
