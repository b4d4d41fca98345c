"""What a pool holds, and some of its rows."""

import torch
from torch import Tensor

from diffkv.kernels.check import check_report
from diffkv.kernels.cpu.library import CPU, handle
from diffkv.state import PoolState

__all__ = ["report"]


def report(state: PoolState, slots: Tensor, numbers: Tensor) -> None:
    """Same contract as `reference.report`."""
    pool = handle(state)
    most = check_report(slots, numbers, CPU)
    pool.library.report(
        pool.address, slots.data_ptr(), slots.numel(), most, numbers.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
