"""An orthogonal rotation of head vectors that spreads outliers over all channels before quantising.

Scores are dot products and outputs are weighted sums of values, so with an orthogonal R

    (q R) (k R)^T = q k^T        and        P (v R) R^T = P v

hold exactly in real numbers: what attends is unchanged, what is stored has no channel that sets the
scale of its whole vector. R is a random Hadamard matrix (QuaRot, Ashkboos et al. 2024): signs, then a
Hadamard transform. The signs keep a vector that is constant over its channels from becoming one outlier.
"""

import torch
from torch import Tensor

from diffkv.quant import ConfigError, LayerQuant

__all__ = ["ROTATIONS", "Rotation", "block_size", "choose", "hadamard_matrix"]

NONE, HADAMARD = ROTATIONS = ("none", "hadamard")
"""Values of the option `rotate`."""

_SIGN_SEED = 0


def choose(name: str | None, quant: LayerQuant) -> str:
    """The rotation that was asked for, or the one that goes with formats.

    Rotating is the default wherever something is quantised: outliers are common, and without it they
    cost far more than it does where there are none (docs/log.md). `k16v16` stays as it is, bit by bit.

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


def hadamard_matrix(head_dim: int) -> Tensor:
    """The rotation as a matrix: random signs, then Hadamard transforms of blocks of neighbours.

    Args:
        head_dim: channels of a head; blocks have the largest power of two that divides it.

    Returns:
        [head_dim, head_dim] float32, orthogonal; vectors are rows, `x @ matrix` rotates them.
    """
    size = block_size(head_dim)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    blocks = torch.block_diag(*[hadamard * size**-0.5] * (head_dim // size))
    generator = torch.Generator().manual_seed(_SIGN_SEED)
    signs = torch.randint(0, 2, (head_dim,), generator=generator) * 2.0 - 1
    return signs[:, None] * blocks


class Rotation:
    """Rotates queries, keys and values after rotary embedding, and turns outputs back.

    Products are of the vectors' dtype with sums in float32, so rotated 16-bit vectors are rounded once
    more: a cache of k16v16 is then equal to the engine's own up to that rounding, not bit by bit.

    Args:
        head_dim: of the vectors.
        device: of the vectors.
        dtype: of the vectors.
    """

    def __init__(self, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        matrix = hadamard_matrix(head_dim)
        self._matrix = matrix.to(device, dtype)
        self._inverse = matrix.T.contiguous().to(device, dtype)

    @classmethod
    def of(
        cls, name: str, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> "Rotation | None":
        """The rotation of that name, as `choose` gives it; None for "none"."""
        return None if name == NONE else cls(head_dim, device, dtype)

    def apply(self, vectors: Tensor) -> Tensor:
        """Rotate [..., head_dim] vectors. The result is new."""
        return vectors @ self._matrix

    def undo(self, vectors: Tensor) -> None:
        """Turn [..., head_dim] vectors back, in place."""
        vectors.copy_(vectors @ self._inverse)
