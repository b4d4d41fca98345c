"""What one forward pass brings to a cache, and how prompts of several requests are packed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkv.state import DecodePlan, PromptTokens

__all__ = ["PromptChunk", "Step", "joined", "pack", "slot_tensor", "starts_of"]


@dataclass(frozen=True)
class PromptChunk:
    """Some tokens of one request's prompt, as a span of a packed batch.

    Attributes:
        slot: of the request.
        span: rows of the batch.
        num_stored: prompt tokens that came in earlier chunks.
        prompt_len: tokens of the whole prompt.
    """

    slot: int
    span: slice
    num_stored: int
    prompt_len: int

    @property
    def end(self) -> int:
        """Prompt tokens that are in the cache after this chunk."""
        return self.num_stored + self.span.stop - self.span.start

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete with this chunk."""
        return self.end == self.prompt_len


@dataclass(frozen=True)
class Step:
    """What one forward pass adds to the cache; the same for every layer.

    Attributes:
        prompts: chunks of prompts.
        decode_rows: [R] int64, rows of the batch that are generated tokens, or a slice of them.
        plans: where those tokens go, for each group of layers; empty if there are none.
    """

    prompts: tuple[PromptChunk, ...]
    decode_rows: slice | Tensor
    plans: tuple[DecodePlan, ...]


def pack(
    slots: Sequence[int],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    firsts: Sequence[int],
) -> PromptTokens:
    """Tokens of several requests, one request after the other.

    Args:
        slots: by request.
        keys: by request, [n, num_kv_heads, head_dim].
        values: likewise.
        firsts: index of each request's first token here.
    """
    lengths, device = [len(k) for k in keys], keys[0].device
    positions = [
        torch.arange(first, first + length, dtype=torch.int32)
        for first, length in zip(firsts, lengths, strict=True)
    ]
    return PromptTokens(
        slot_tensor(slots, device), starts_of(lengths, device), joined(keys), joined(values),
        torch.cat(positions).to(device),
    )  # fmt: skip


def slot_tensor(slots: Sequence[int], device: torch.device) -> Tensor:
    """[R] int32."""
    return torch.tensor(slots, dtype=torch.int32, device=device)


def starts_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[R + 1] int32: where each of R requests starts in a packed batch, and where the last one ends."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(lengths).cumsum(0)
    return starts.to(device)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension, contiguous."""
    return (tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))).contiguous()
