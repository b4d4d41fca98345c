"""Launches that cost the host little.

Triton finds a kernel anew for every launch, which takes several times as long as starting it, and a step
with prompts has thousands. Here it is found by what it was compiled for, and given plain addresses.
"""

from typing import Any

import torch
from torch import Tensor

from diffkv.kernels.triton.constants import INTERPRETED

__all__ = ["launch"]

ALIGNMENT = 16
"""Triton compiles a kernel anew for pointers, and for integers, that are multiples of it."""


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Tensor | int | float, **constants: Any
) -> None:
    """The same as `kernel[grid](*args, **constants)`.

    Args:
        kernel: made by `triton.jit`; it is never freed. Its constants are its last parameters.
        grid: programs along one to three dimensions.
        args: all parameters that are no constants, in order.
        constants: the constants, and options of the launch, always in one order; all can be hashed.
    """
    if INTERPRETED:
        kernel[grid](*args, **constants)
        return
    launcher = _launchers.get(id(kernel))
    if launcher is None:
        launcher = _launchers[id(kernel)] = _Launcher(kernel)
    launcher.run(grid, args, constants)


class _Launcher:
    """Knows a kernel as it was compiled, for each kind of arguments."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._by_value = [not p.do_not_specialize for p in kernel.params if not p.is_constexpr]
        self._constants = [p.name for p in kernel.params if p.is_constexpr]
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def run(self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        kinds = [torch.cuda.current_device(), *constants, *constants.values()]
        values = []
        for arg, by_value in zip(args, self._by_value, strict=True):
            kind: Any = type(arg)
            if kind is int:
                kind = arg.bit_length() > 31
                if by_value:
                    kind += 2 * (arg % ALIGNMENT == 0) + 4 * (arg == 1)
            elif kind is not float:
                kind, arg = arg.dtype, arg.data_ptr()
                if arg % ALIGNMENT:
                    kind = kind, arg % ALIGNMENT
            kinds.append(kind)
            values.append(arg)
        key = tuple(kinds)
        found = self._compiled.get(key)
        if found is not None:
            compiled, fixed = found
            compiled[(*grid, 1, 1)[:3]](*values, *fixed)
            return
        compiled = self._kernel[grid](*args, **constants)
        self._compiled[key] = compiled, tuple(constants.get(name) for name in self._constants)


_launchers: dict[int, _Launcher] = {}
