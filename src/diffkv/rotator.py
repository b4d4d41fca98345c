"""Rotates vectors on their way into pages, and turns back what is read of them."""

import torch
from torch import Tensor

from diffkv.ops import Ops

__all__ = ["Rotator"]


class Rotator:
    """The rotation of one model's keys and values in pages (`diffkv.rotation`), or none.

    Args:
        ops: the kernels, as `diffkv.ops.load` returns them.
        signs: [head_dim] float32 of the rotation; None for none.

    Attributes:
        signs: the same.
    """

    def __init__(self, ops: Ops, signs: Tensor | None) -> None:
        self._ops = ops
        self.signs = signs

    def rotate(self, vectors: Tensor) -> Tensor:
        """[..., head_dim] as they are stored; the same tensor where nothing is rotated."""
        if self.signs is None:
            return vectors
        out = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
        self._ops.rotate(vectors, self.signs, False, out)
        return out

    def unrotate(self, vectors: Tensor) -> None:
        """Turn vectors back that were read of pages, in place."""
        if self.signs is not None:
            self._ops.rotate(vectors, self.signs, True, vectors)
