"""Finds what Triton's interpreter lets pass: loads and stores outside of a kernel's tensors.

On a GPU such an access may end the process, or change nothing, as it happens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter

__all__ = ["OutOfBoundsError", "in_bounds"]


class OutOfBoundsError(Exception):
    """A kernel reaches beyond its tensors."""


class _Bounds:
    """Where the tensors of the launch that runs begin and end, in order."""

    def __init__(self) -> None:
        self.kernel, self.begins, self.ends = "", np.zeros(0, np.int64), np.zeros(0, np.int64)

    def enter(self, kernel: str, arguments: tuple[Any, ...]) -> None:
        """A launch begins."""
        spans = sorted(_span(each) for each in arguments if isinstance(each, torch.Tensor))
        self.kernel, self.begins = kernel, np.array([first for first, _ in spans], np.int64)
        # Views of one tensor overlap
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], np.int64))

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        """Raise unless all of some pointers are to elements of tensors."""
        at = pointers.data.astype(np.int64)[np.broadcast_to(mask.data, pointers.data.shape) != 0]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        place = np.searchsorted(self.begins, at, side="right") - 1
        outside = (place < 0) | (at + size > self.ends[np.maximum(place, 0)])
        if outside.any():
            raise OutOfBoundsError(f"{self.kernel}: {outside.sum()} of {at.size}, {what}")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    steps = (
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    length = sum(steps) + 1 if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size()


def _checked(
    bounds: _Bounds, what: str, place: int, plain: Callable[..., Any]
) -> Callable[..., Any]:
    """An operation of the interpreter, with pointers and a mask among its arguments."""

    def operation(*args: Any) -> Any:
        bounds.check(
            what, args[place], args[-3 if what == "atomic" else place + 1 + (what == "store")]
        )
        return plain(*args)

    return operation


@contextmanager
def in_bounds() -> Iterator[None]:
    """Kernels that are interpreted meanwhile may reach nothing but the tensors that they are given."""
    bounds, launch = _Bounds(), interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        bounds.enter(self.fn.__name__, (*args, *kwargs.values()))
        launch(self, *args, **kwargs)

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        for name, what, place in (
            ("create_masked_load", "load", 0),
            ("create_masked_store", "store", 0),
            ("create_atomic_rmw", "atomic", 1),
        ):
            patch.setattr(builder, name, _checked(bounds, what, place, getattr(builder, name)))
        yield
