"""The tensors of a pool: names, shapes, dtypes. Every operation works on them in place.

No logic lives here. Who creates them out of a memory budget: `pool`. Who changes them: the operations
of `reference` and `kernels`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffkv.layout import PageLayout

__all__ = [
    "IDS",
    "TENSORS",
    "DecodePlan",
    "NewTokens",
    "PoolState",
    "PromptTokens",
    "TensorSpec",
    "sizes_of",
]

IDS = "ids"
"""Initial value of a ring: all ids, from 0 on."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a pool.

    Attributes:
        dtype: dtype of its elements.
        shape: numbers and names of sizes, see `sizes_of`.
        initial: its elements in an empty pool: one value everywhere, a size for each element, `IDS`, or
            None where it does not matter.
        meaning: in words.
    """

    dtype: torch.dtype
    shape: str
    initial: int | str | None
    meaning: str


def sizes_of(names: str, pool: object) -> tuple[int, ...]:
    """Numbers as they are, and names as a `PoolState` or a `PoolShape` has them: "num_slots 2"."""
    return tuple(int(x) if x.isdigit() else getattr(pool, x) for x in names.split())


_U8, _I32, _I64 = torch.uint8, torch.int32, torch.int64
_F32, _BF16 = torch.float32, torch.bfloat16
_HEADS = "num_slots num_layers num_kv_heads"

TENSORS = {
    "overruns": TensorSpec(_I32, "1", 0, "plans that wanted more pages than were free"),
    "demotions": TensorSpec(_I64, "1", 0, "tokens that decode steps took from high to low"),
    "thresholds": TensorSpec(_F32, "num_slots 2", 0, "(alpha_high, alpha_low) of each open row"),
    "prompt_lens": TensorSpec(
        _I32, "num_slots", 0, "tokens of the prompt of each open row's request"
    ),
    "chains": TensorSpec(_I32, "num_slots chain_width", -1, "closed rows before each open row"),
    "chain_lens": TensorSpec(_I32, "num_slots", 0, "how many there are"),
    "centres": TensorSpec(
        _BF16, f"{_HEADS} centre_dim", 0, "what was subtracted from a row's keys"
    ),
    "directory": TensorSpec(_I32, f"{_HEADS} directory_width", -1, "ids of each head's leaves"),
    "num_tokens": TensorSpec(_I32, f"{_HEADS} 2", 0, "kept tokens by tier (high, low)"),
    "num_pages_held": TensorSpec(_I32, f"{_HEADS} 2", 0, "pages by tier (high, low)"),
    "leaves": TensorSpec(_I32, "num_leaves leaf_entries", -1, "ids of each leaf's pages"),
    "free_leaves": TensorSpec(_I32, "num_leaves", IDS, "ring of the ids of free leaves"),
    "leaf_ends": TensorSpec(_I64, "2", "0 num_leaves", "(head, tail) of that ring"),
    "free_ring": TensorSpec(_I32, "num_pages", IDS, "ring of the ids of free pages"),
    "ring_ends": TensorSpec(_I64, "2", "0 num_pages", "(head, tail) of that ring"),
    "pages": TensorSpec(_U8, "num_pages page_bytes", None, "tokens, as the layout places them"),
}
"""Every tensor of a `PoolState`, in the order in which a buffer holds them: tables, then pages.

Allocation, the kernels' checks, the struct of the C++ kernels and the tests are made from it.
"""


@dataclass(frozen=True, eq=False)
class PoolState:
    """A pool of pages and the tables of all layers of a model, on one device.

    Its tensors are described in `TENSORS`. Tables are of rows: a row is a range of tokens of one
    sequence, and its slot says where its tables are. A request has one open row, and before it a chain
    of closed ones, which never change and which other requests may share: row `chains[slot, k]` for k
    below `chain_lens[slot]`, first tokens first.

    Keys are stored as their difference from `centres` of their row, layer and head, where `centre_dim`
    is not 0. No result knows: reading adds it, and to attend among a row's keys is to add the product
    of query and centre to all of its scores.

    A head's page table has two levels, so that it is about as
    large as what the head holds: its row of the directory names leaves, and a leaf names pages of one
    tier. Page `number` of a tier is entry `number % leaf_entries`, a power of two, of the tier's leaf
    `number // leaf_entries`. High leaves stand in a row from the left, low ones from the right (the k-th
    at `directory_width - 1 - k`), with -1 between them. What follows a tier's last page in a leaf means
    nothing. There are as many leaves as heads can need that hold all pages between them, however they
    share them, so leaves are never short.

    The ends of a ring count what was taken and what was given back since the start. Both only grow, id
    k is at `k % len(ring)`, and tail - head ids are free; so a full ring is not mistaken for an empty
    one. A plan that wants more pages than are free counts in `overruns`, and takes nothing: a fault of
    whoever admitted the requests.

    Attributes:
        layout: layout of a page.
        dtype: the model's dtype: float32, bfloat16 or float16; `layout.element_bytes` is its size.
        window: recent tokens that always stay high.
        segment: tokens of a closed row, but for some shorter ones; 0 where there are none.
    """

    layout: PageLayout
    dtype: torch.dtype
    window: int
    segment: int
    overruns: Tensor
    demotions: Tensor
    thresholds: Tensor
    prompt_lens: Tensor
    chains: Tensor
    chain_lens: Tensor
    centres: Tensor
    directory: Tensor
    num_tokens: Tensor
    num_pages_held: Tensor
    leaves: Tensor
    free_leaves: Tensor
    leaf_ends: Tensor
    free_ring: Tensor
    ring_ends: Tensor
    pages: Tensor

    @property
    def num_pages(self) -> int:
        """Pages of the pool, free or held."""
        return self.pages.shape[0]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.layout.page_bytes

    @property
    def num_slots(self) -> int:
        """Rows that there can be at once, open and closed."""
        return self.directory.shape[0]

    @property
    def num_layers(self) -> int:
        """Attention layers of the model."""
        return self.directory.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer, on this rank."""
        return self.directory.shape[2]

    @property
    def directory_width(self) -> int:
        """Leaves that a head can have."""
        return self.directory.shape[3]

    @property
    def chain_width(self) -> int:
        """Closed rows that a request can have."""
        return self.chains.shape[1]

    @property
    def centre_dim(self) -> int:
        """Elements of a centre: head_dim, or 0 where there are none."""
        return self.centres.shape[3]

    @property
    def num_leaves(self) -> int:
        """Leaves of the pool, free or held."""
        return self.leaves.shape[0]

    @property
    def leaf_entries(self) -> int:
        """Pages that a leaf can name."""
        return self.leaves.shape[1]

    @property
    def leaf_shift(self) -> int:
        """Base-2 logarithm of `leaf_entries`."""
        return self.leaf_entries.bit_length() - 1

    @property
    def max_pages(self) -> int:
        """Most pages that a head's leaves can name."""
        return self.directory_width * self.leaf_entries

    def exact(self) -> "PoolState":
        """The same tensors for rows whose tokens are as the model made them, all in the high tier.

        Operations work on it as on any state, as long as they are only given such rows.
        """
        return replace(self, layout=self.layout.exact(), centres=self.centres[..., :0])


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


@dataclass(frozen=True)
class NewTokens:
    """The new token of each request of a decode step, for one layer.

    Attributes:
        plan: where they go.
        key: [R, num_kv_heads, head_dim], the model's dtype, rotary embedding applied.
        value: [R, num_kv_heads, head_dim], likewise.
    """

    plan: DecodePlan
    key: Tensor
    value: Tensor
