"""Cache formats of other engines, to compare ours with: a vector becomes what it would be read as.

`OTHER_FORMATS` is the only list of their names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from diffkv.lab.evaluation.results import Method
from diffkv.quant import ConfigError
from diffkv.rotation import hadamard_blocks, signs

__all__ = ["OTHER_FORMATS", "OtherFormat"]

BLOCK = 32
"""Elements that share a scale in llama.cpp's formats."""

SCALE_BYTES = 2
"""Bytes of the scale of a block: fp16."""

INT4_META_BYTES = 4
"""Bytes beside the 4-bit codes of a vector in vLLM: a float32 scale, with the zero in its last bits."""

LEAST_SCALE = 1e-6


@dataclass(frozen=True)
class OtherFormat:
    """A format of keys and values.

    Attributes:
        name: as its engine calls it.
        origin: whose it is.
        bits: of an element's code.
        meta_bytes: bytes beside the codes, for each `block` elements.
        block: elements that share them; 0: all of a vector.
        round_trip: [..., head_dim] float32 -> the same, as it would be read.
    """

    name: str
    origin: str
    bits: int
    round_trip: Callable[[Tensor], Tensor]
    meta_bytes: int = 0
    block: int = 0

    def vector_bytes(self, head_dim: int) -> float:
        """Bytes of a vector, codes and what goes with them.

        Raises:
            ConfigError: a vector is not a whole number of blocks.
        """
        block = self.block or head_dim
        if head_dim % block:
            raise ConfigError(
                f"{self.name} has blocks of {block}: head_dim {head_dim} is no multiple"
            )
        return head_dim * self.bits / 8 + head_dim // block * self.meta_bytes

    def method(self, model: str, engine: str) -> Method:
        """The format, a model and an engine as rows name them: all tokens in one tier."""
        return Method(model, engine, self.name, "none", 0.0, 0.0, window=0, rotate="none")


def _away(x: Tensor) -> Tensor:
    """Round to the nearest whole number, halves away from zero, as C's roundf does."""
    whole = x.trunc()
    return whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0.0)


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _fp8(x: Tensor) -> Tensor:
    """E4M3 without a scale; what is too large becomes the largest number."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).float()


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def _q8_0(x: Tensor) -> Tensor:
    """Codes by the exact scale amax / 127; what is stored and read is that scale in fp16."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = _away(blocks * _reciprocal(scale))
    return (codes * scale.half().float()).flatten(-2)


def _q4_0(x: Tensor) -> Tensor:
    """The element that is largest without its sign becomes -8 times the scale."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = (blocks * _reciprocal(scale) + 8.5).floor().clamp(max=15)
    return ((codes - 8) * scale.half().float()).flatten(-2)


def _int4(x: Tensor) -> Tensor:
    """Asymmetric over a vector, with a whole number between 0 and 15 as its zero."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=LEAST_SCALE)
    zero = _away(-low / scale).clamp(0, 15)
    codes = _away(x * (1 / scale) + zero).clamp(0, 15)
    stored = (scale.contiguous().view(torch.int32) & -16).view(torch.float32)
    return (codes - zero) * stored


@cache
def _rotation(head_dim: int, device: torch.device) -> Tensor:
    """[head_dim, head_dim]: a random Hadamard rotation, to be multiplied from the right."""
    return (signs(head_dim)[:, None] * hadamard_blocks(head_dim)).to(device)


def _rotated(round_trip: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The same between a rotation and its inverse."""
    rotation = _rotation(x.shape[-1], x.device)
    return round_trip(x @ rotation) @ rotation.T


OTHER_FORMATS = {
    each.name: each
    for each in (
        OtherFormat("bf16", "vLLM", 16, _bf16),
        OtherFormat("fp8", "vLLM", 8, _fp8),
        OtherFormat("q8_0", "llama.cpp", 8, _q8_0, SCALE_BYTES, BLOCK),
        OtherFormat("q4_0", "llama.cpp", 4, _q4_0, SCALE_BYTES, BLOCK),
        OtherFormat("int4_per_token_head", "vLLM", 4, partial(_rotated, _int4), INT4_META_BYTES),
        OtherFormat("int4_per_token_head-unrotated", "vLLM", 4, _int4, INT4_META_BYTES),
    )
}
"""Every format by name."""
