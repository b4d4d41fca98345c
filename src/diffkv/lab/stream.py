"""A copy that streams through a GPU's memory as fast as it goes, to compare kernels with."""

import torch
import triton
import triton.language as tl

__all__ = ["copy"]

BLOCK = 1024


@triton.jit
def _copy_kernel(from_ptr, to_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at))


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a tensor; torch's own copy reaches less than two thirds of an H200's bandwidth.

    Args:
        source: contiguous, a multiple of `BLOCK` elements.
        target: like it.
    """
    _copy_kernel[(source.numel() // BLOCK,)](source, target, BLOCK)
