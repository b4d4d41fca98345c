"""Scratch memory of a pool, kept as long as its state: a decode step allocates nothing.

Buffers are made at the largest size that the state can need, so that one that a CUDA graph has captured
is not outgrown. One that is outgrown all the same is kept alive: by a batch padded beyond the slots, or
by more requests than before, where slots do not say how many there can be.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffkv.kernels.by_state import by_state
from diffkv.kernels.check import check_state
from diffkv.kernels.triton.constants import (
    Table,
    Tier,
    is_roomy,
    multiprocessors,
    power_of_2,
    tiers_of,
)
from diffkv.kernels.triton.order import overlap
from diffkv.kernels.triton.worklist import CHUNK_TOKENS
from diffkv.layout import PageLayout
from diffkv.state import PoolState

__all__ = ["MOST_REGISTERS", "Tuning", "Workspace", "workspace"]

MAX_VIEWS = 1024

MOST_REGISTERS = 255
"""Of a thread."""


@dataclass(frozen=True)
class Tuning:
    """Launch parameters of `attend`; no result depends on it beyond rounding.

    Defaults are for vectors of 16 bits and large ones, which take the most registers and shared memory:
    `of` knows better.

    Attributes:
        num_warps: warps of a program.
        num_stages: of a tile: its pages are looked up, loaded, and attended to. With 5, two tiles are
            on their way while one is attended to; with 3 or 4, one.
        programs: per multiprocessor, where there is work for all.
        tile: tokens of a tile, a power of two of at least 16; None: by head_dim.
        max_registers: registers of a thread, at most, so that all programs run at once.
        fast: convert codes with `prmt`, which the interpreter does not know.
        score_tiles: tiles of one layer whose probabilities are kept between the passes; those of
            further tiles are computed twice. None: a share of the pool.
        chunk_tokens: high tokens of the smallest chunk.
    """

    num_warps: int = 1
    num_stages: int = 3
    programs: int = 8
    tile: int | None = None
    max_registers: int = MOST_REGISTERS
    fast: bool = True
    score_tiles: int | None = None
    chunk_tokens: int = CHUNK_TOKENS

    @classmethod
    def of(cls, layout: PageLayout, dtype: torch.dtype, fast: bool, roomy: bool) -> "Tuning":
        """Those for a layout, a model's dtype, and a device with much shared memory or less."""
        formats = [tier.format for tier in layout.tiers]
        coded = all(max(fmt.k_bits, fmt.v_bits) < 16 and fmt.v_groups == 1 for fmt in formats)
        if coded and layout.head_dim <= 128 and dtype.itemsize == 2:
            stages = 5 if roomy else 3
            return cls(num_stages=stages, programs=12, max_registers=168, fast=fast)
        return cls(fast=fast)


@dataclass(eq=False)
class Workspace:
    """A state as kernels see it, and its scratch buffers.

    Attributes:
        tiers: tiers of the layout, high first.
        table: sizes of its page tables.
        device: device of every tensor.
        num_slots: slots of the state, open rows and closed ones.
        has_chains: whether a request may have more than its open row.
        multiprocessors: number of the device's multiprocessors.
        tuning: launch parameters of `attend`.
        overlap: what launches are given, see `order.overlap`.
        ticket: [1] int32, see `ring.is_last`.
        buffers: flat buffers by name.
        views: those in the shapes that were asked for lately.
        outgrown: former buffers.
    """

    tiers: tuple[Tier, ...]
    table: Table
    device: torch.device
    num_slots: int
    has_chains: bool
    multiprocessors: int
    tuning: Tuning
    overlap: dict[str, Any]
    ticket: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)
    views: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)
    outgrown: list[Tensor] = field(default_factory=list)

    def num_requests(self, num: int) -> int:
        """Requests that buffers should be made for where there are `num`.

        Without chains that is the number of slots. Closed rows take slots too, many more than requests
        do, so with them buffers grow: by doubling.
        """
        if not self.has_chains:
            return self.num_slots
        return min(self.num_slots, power_of_2(num))

    def buffer(self, name: str, dtype: torch.dtype, *shape: int, least: int = 0) -> Tensor:
        """A buffer of a shape, contents undefined: the front of the one that has that name.

        Args:
            name: name of the buffer.
            dtype: dtype of its elements.
            shape: wanted.
            least: elements that it is made with at least, the most that the state can need.
        """
        key = name, shape
        found = self.views.get(key)
        if found is not None:
            return found
        num = math.prod(shape)
        flat = self.buffers.get(name)
        if flat is None or flat.numel() < num:
            grown = 1
            if flat is not None:
                self.outgrown.append(flat)
                grown = 2 * flat.numel()  # so that those outgrown are no larger together
            flat = torch.empty(max(num, least, grown), dtype=dtype, device=self.device)
            self.buffers[name] = flat
            self.views.clear()
        elif len(self.views) >= MAX_VIEWS:
            self.views.clear()
        self.views[key] = found = flat[:num].view(shape)
        return found


@by_state
def workspace(state: PoolState) -> Workspace:
    """The workspace of a state, which is checked when it is first seen.

    Raises:
        ValueError: a tensor of the state is not what `TENSORS` says.
    """
    device = state.pages.device
    check_state(state, device)
    tuning = Tuning.of(state.layout, state.dtype, device.type == "cuda", is_roomy(device))
    table = Table(state.directory_width, state.leaf_entries)
    has_chains = state.chain_width > 0
    return Workspace(
        tiers_of(state.layout),
        table,
        device,
        state.num_slots,
        has_chains,
        multiprocessors(device),
        tuning,
        overlap(device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
