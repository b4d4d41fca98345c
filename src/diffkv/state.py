"""The tensors of a pool: names, shapes, dtypes. Every operation works on them in place.

No logic lives here. Who creates them out of a memory budget: `pool`. Who changes them: the operations
of `reference` and `kernels`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffkv.layout import PageLayout

__all__ = ["DecodePlan", "PoolState", "PromptTokens"]


@dataclass(frozen=True)
class PoolState:
    """A pool of pages and the tables of all layers of a model, on one device.

    S slots (running requests), L layers, H KV heads. A head's page table has two levels, so that it is
    about as large as what the head holds: its row of the directory names leaves, and a leaf names up to
    E pages of one tier. Page `number` of a tier is entry `number % E` of the tier's leaf `number // E`.

    Attributes:
        layout: what is where in a page.
        dtype: the model's dtype: float32, bfloat16 or float16; `layout.element_bytes` is its size.
        window: recent tokens that always stay high.
        pages: [num_pages, page_bytes] uint8.
        free_ring: [num_pages] int32, ids of free pages, from `ring_ends[0]` to `ring_ends[1]`.
        ring_ends: [2] int64, (head, tail): pages taken and pages given back since the start. Both only
            grow, entry k of the ring is at k % num_pages, and tail - head pages are free; so a full
            ring is not mistaken for an empty one.
        leaves: [num_leaves, E] int32, ids of pages; what follows a tier's last page means nothing.
            E is a power of two.
        free_leaves: [num_leaves] int32, a ring like `free_ring`, of ids of leaves.
        leaf_ends: [2] int64, of that ring. There are as many leaves as heads can need who hold all pages
            between them, however they share them, so leaves are never short.
        directory: [S, L, H, W] int32, ids of leaves. High ones from the left, low ones from the right:
            the k-th low leaf is entry W - 1 - k. -1 where there is no leaf.
        num_tokens: [S, L, H, 2] int32, kept tokens by tier (high, low).
        num_pages_held: [S, L, H, 2] int32.
        thresholds: [S, 2] float32, (alpha_high, alpha_low) of each slot's request.
        prompt_lens: [S] int32, tokens of each slot's prompt.
        overruns: [1] int32, how often a plan wanted more pages than were free. Anything but 0 is a
            fault of whoever admitted the requests; the plan then takes nothing.
    """

    layout: PageLayout
    dtype: torch.dtype
    window: int
    pages: Tensor
    free_ring: Tensor
    ring_ends: Tensor
    leaves: Tensor
    free_leaves: Tensor
    leaf_ends: Tensor
    directory: Tensor
    num_tokens: Tensor
    num_pages_held: Tensor
    thresholds: Tensor
    prompt_lens: Tensor
    overruns: Tensor

    @property
    def num_pages(self) -> int:
        """Pages of the pool, free or held."""
        return self.pages.shape[0]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.directory.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """H, on this rank."""
        return self.directory.shape[2]

    @property
    def leaf_entries(self) -> int:
        """E."""
        return self.leaves.shape[1]

    @property
    def directory_width(self) -> int:
        """W."""
        return self.directory.shape[3]

    @property
    def max_pages(self) -> int:
        """Most pages that a head's leaves can name."""
        return self.directory_width * self.leaf_entries


@dataclass(frozen=True)
class PromptTokens:
    """Tokens of R requests, packed one request after the other, for one layer.

    Attributes:
        slots: [R] int32.
        cu_seqlens: [R + 1] int32, where each request's tokens start; the last entry is N.
        key: [N, num_kv_heads, head_dim], the model's dtype, rotary embedding applied.
        value: [N, num_kv_heads, head_dim], likewise.
        positions: [N] int32, index of each token in its request.
    """

    slots: Tensor
    cu_seqlens: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor


@dataclass(frozen=True)
class DecodePlan:
    """Where the new tokens of a decode step go, made once for all layers.

    Attributes:
        slots: [R] int32, -1 for a row that is no request (padding).
        positions: [R] int32, index of each request's new token.
        places: [R, L, H, 4] int32: (page, index) of the new token, always in the high tier, then
            (page, index) in the low tier for the token that it replaces, or (-1, -1) if that is
            dropped or if nothing is replaced.
    """

    slots: Tensor
    positions: Tensor
    places: Tensor
