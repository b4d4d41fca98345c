"""An orthogonal rotation of head vectors that spreads outliers over all channels before quantising.

Scores are dot products and outputs are weighted sums of values, so with an orthogonal R

    (q R) (k R)^T = q k^T        and        P (v R) R^T = P v

hold exactly in real numbers: what attends is unchanged, what is stored has no channel that sets the
scale of its whole vector. R is a random Hadamard matrix (QuaRot, Ashkboos et al. 2024): signs, then a
Hadamard transform. The signs keep a vector that is constant over its channels from becoming one outlier.
"""

import torch
from torch import Tensor

from diffkv.quant import ConfigError, QuantConfig

__all__ = [
    "ROTATIONS",
    "block_size",
    "choose",
    "hadamard_blocks",
    "hadamard_matrix",
    "signs",
    "signs_of",
]

NONE, HADAMARD = ROTATIONS = ("none", "hadamard")
"""Values of the option `rotate`."""

_SIGN_SEED = 0


def choose(name: str | None, quant: QuantConfig) -> str:
    """The rotation that was asked for, or the one that goes with formats.

    Rotating is the default wherever something is quantised: outliers are common, and without it they
    cost far more than it does where there are none (docs/decisions.md). `k16v16` stays as it is, bit for
    bit.

    Raises:
        ConfigError: an unknown name.
    """
    if name is None:
        return NONE if quant.is_exact else HADAMARD
    if name not in ROTATIONS:
        raise ConfigError(f"rotate must be {' or '.join(ROTATIONS)}, got {name!r}")
    return name


def block_size(head_dim: int) -> int:
    """Channels that are rotated together: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


def hadamard_blocks(head_dim: int) -> Tensor:
    """[head_dim, head_dim] float32: Hadamard transforms of blocks of neighbours, on the diagonal.

    Orthogonal and symmetric, so that it is its own inverse.
    """
    size = block_size(head_dim)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    return torch.block_diag(*[hadamard * size**-0.5] * (head_dim // size))


def signs(head_dim: int) -> Tensor:
    """[head_dim] float32 of 1 and -1, drawn once and for all."""
    generator = torch.Generator().manual_seed(_SIGN_SEED)
    return torch.randint(0, 2, (head_dim,), generator=generator) * 2.0 - 1


def signs_of(name: str, head_dim: int, device: torch.device) -> Tensor | None:
    """Signs for the operation `rotate`, by the name that `choose` gave; None for "none"."""
    return None if name == NONE else signs(head_dim).to(device)


def hadamard_matrix(head_dim: int) -> Tensor:
    """The rotation as a matrix: signs, then Hadamard transforms of blocks of neighbours.

    Args:
        head_dim: channels of a head; blocks have the largest power of two that divides it.

    Returns:
        [head_dim, head_dim] float32, orthogonal; vectors are rows, `x @ matrix` rotates them.
    """
    return signs(head_dim)[:, None] * hadamard_blocks(head_dim)
