"""Print the squared error of few bits by how much of a group's range is cut off (`diffkv.quant`).

And what is left of a vector's length along itself, if codes are read back by their own grid.

python tools/quantiser_cuts.py
"""

import torch
from torch import Tensor

from diffkv.quant import cut_of

ELEMENTS = 400_000
STEPS = 64
"""Cuts are tried in parts of the range of one in so many."""


def read_back(x: Tensor, bits: int, cut: float) -> Tensor:
    """Groups [num, width] by the grid of their codes, ends moved inwards by a share of the range."""
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    span = most - least
    least, most = least + cut * span, most - cut * span
    levels = 2**bits - 1
    scale = ((most - least) / levels).clamp(min=1e-6)
    code = ((x - least) / scale + 0.5).floor().clamp(0, levels)
    return code * scale + least


def error(x: Tensor, bits: int, cut: float) -> float:
    """Mean squared error of what is read back."""
    return float((read_back(x, bits, cut) - x).square().mean())


def main() -> None:
    """A row for each size of a group and number of bits, of normally distributed elements."""
    generator = torch.Generator().manual_seed(0)
    print(f"elements  bits   whole    best  at   used (of {STEPS})  length")
    for log in range(3, 9):
        width = 1 << log
        x = torch.randn(ELEMENTS // width, width, generator=generator)
        for bits in (1, 2, 4):
            errors = [error(x, bits, step / STEPS) for step in range(STEPS // 2)]
            best = min(range(len(errors)), key=errors.__getitem__)
            used = round(cut_of(bits, width) * STEPS)
            along = (x * read_back(x, bits, cut_of(bits, width))).mean() / x.square().mean()
            print(
                f"{width:8}  {bits:4}  {errors[0]:6.4f}  {errors[best]:6.4f}  {best:2}  {used:4}"
                f"{along:15.3f}"
            )


if __name__ == "__main__":
    main()
