"""Rotate vectors, and turn them back."""

import torch
from torch import Tensor

from diffkv.rotation import hadamard_blocks

__all__ = ["rotate", "rotated"]


def rotate(x: Tensor, signs: Tensor, inverse: bool, out: Tensor) -> None:
    """Rotate vectors by signs and Hadamard transforms, in float32 (`diffkv.rotation`).

    Args:
        x: [num_rows, num_heads, head_dim] of float32, bfloat16 or float16; vectors of a row lie side
            by side.
        signs: [head_dim] float32 of 1 and -1, as `rotation.signs` gives them.
        inverse: turn rotated vectors back.
        out: like x, written; may be x itself.
    """
    blocks = hadamard_blocks(x.shape[-1]).to(x.device)
    vectors = x.float()
    out.copy_((vectors @ blocks) * signs if inverse else (vectors * signs) @ blocks)


def rotated(x: Tensor, signs: Tensor) -> Tensor:
    """What `rotate` makes of vectors, in a tensor of its own."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotate(x, signs, False, out)
    return out
