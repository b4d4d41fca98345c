"""Numbers on their way to a device: noted one list after the other, copied together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Place", "Uploads", "at_once", "on_device"]

Place = Callable[..., Tensor]
"""Puts numbers on a device: (values, dtype int32) -> [len(values)]."""

ALIGNMENT = 16
"""Bytes: kernels are compiled for pointers of this alignment, and anew for others."""

BUFFER_BYTES = 1 << 16


class Uploads:
    """Lists that a step's kernels read. A step has dozens, and a copy of each would cost microseconds.

    Args:
        device: where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._used = 0

    def add(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        """The numbers on the device, contents undefined before `send`.

        Args:
            values: a list, of lists for more than one dimension, or an array.
            dtype: as which they are to be there.
        """
        numbers = torch.as_tensor(values, dtype=dtype)
        num_bytes = numbers.numel() * dtype.itemsize
        if not self._buffers or self._used + num_bytes > len(self._buffers[-1][0]):
            size = max(BUFFER_BYTES, num_bytes)
            # A copy from memory that is not pinned may wait for the device
            host = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._buffers.append((host, torch.empty(size, dtype=torch.uint8, device=self._device)))
            self._used = 0
        place = slice(self._used, self._used + num_bytes)
        self._used = -(-place.stop // ALIGNMENT) * ALIGNMENT
        host, there = (buffer[place].view(dtype) for buffer in self._buffers[-1])
        host.copy_(numbers.flatten())
        return there.view(numbers.shape)

    def send(self) -> None:
        """Copy all that was added, without waiting for the device."""
        for host, there in self._buffers:
            there.copy_(host, non_blocking=True)
        self._buffers = []


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)] of a list or an array, copied without waiting for the device."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def at_once(device: torch.device) -> Place:
    """A function like `Uploads.add` whose numbers are there at once."""

    def place(values: Sequence[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        return on_device(values, dtype, device)

    return place
