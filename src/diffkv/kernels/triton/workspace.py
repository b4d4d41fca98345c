"""Scratch memory of a pool, kept as long as its state: a decode step allocates nothing.

Buffers are made at the largest size that the state can need, so that one that a CUDA graph has captured
is not outgrown; one that is outgrown all the same, by a batch padded beyond the slots, is kept alive.
"""

import math
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffkv.kernels.triton.check import check_tensor
from diffkv.kernels.triton.facts import DTYPES, Table, Tier, tiers_of
from diffkv.kernels.triton.worklist import CHUNK_TOKENS
from diffkv.state import PoolState

__all__ = ["Tuning", "Workspace", "workspace"]

INTERPRETED_MULTIPROCESSORS = 2
"""Stands in for the number of multiprocessors where there is no GPU."""


@dataclass(frozen=True)
class Tuning:
    """How `attend` is launched; no result depends on it beyond rounding.

    Attributes:
        num_warps: of a program.
        num_stages: tiles in flight.
        programs: per multiprocessor.
        tile: tokens of a tile, a power of two of at least 16; None: by head_dim.
        max_registers: of a thread; None: what the compiler likes.
        fast: convert codes with `prmt`, which the interpreter does not know.
        score_tiles: tiles of one layer whose probabilities are kept between the passes; those of
            further tiles are computed twice. None: a share of the pool.
        chunk_tokens: high tokens of the smallest chunk.
    """

    num_warps: int = 1
    num_stages: int = 5
    programs: int = 8
    tile: int | None = None
    max_registers: int | None = None
    fast: bool = True
    score_tiles: int | None = None
    chunk_tokens: int = CHUNK_TOKENS


@dataclass(eq=False)
class Workspace:
    """Facts of a state for kernels, and its scratch buffers.

    Attributes:
        tiers: of the layout, high first.
        table: sizes of its page tables.
        device: of every tensor.
        num_slots: S of the state.
        multiprocessors: of the device.
        tuning: of `attend`.
        buffers: by name, flat.
        outgrown: former buffers.
    """

    tiers: tuple[Tier, ...]
    table: Table
    device: torch.device
    num_slots: int
    multiprocessors: int
    tuning: Tuning
    buffers: dict[str, Tensor] = field(default_factory=dict)
    outgrown: list[Tensor] = field(default_factory=list)

    def buffer(self, name: str, dtype: torch.dtype, *shape: int, least: int = 0) -> Tensor:
        """A buffer of a shape, contents undefined: the front of the one that has that name.

        Args:
            name: of the buffer.
            dtype: of its elements.
            shape: wanted.
            least: elements that it is made with at least, the most that the state can need.
        """
        num = math.prod(shape)
        flat = self.buffers.get(name)
        if flat is None or flat.numel() < num:
            if flat is not None:
                self.outgrown.append(flat)
            flat = torch.empty(max(num, least, 1), dtype=dtype, device=self.device)
            self.buffers[name] = flat
        return flat[:num].view(shape)


_workspaces: dict[int, tuple[weakref.ref[PoolState], Workspace]] = {}


def workspace(state: PoolState) -> Workspace:
    """The workspace of a state, which is checked when it is first seen.

    Raises:
        ValueError: a tensor of the state is not what `PoolState` says.
    """
    found = _workspaces.get(id(state))
    if found is not None:
        return found[1]
    made = _make(state)
    key = id(state)
    # Found by identity, and forgotten with the state: an id may be used again
    _workspaces[key] = (weakref.ref(state, lambda _: _workspaces.pop(key, None)), made)
    return made


def _make(state: PoolState) -> Workspace:
    device = state.pages.device
    num_slots, layers, heads, width = state.directory.shape
    leaves = len(state.free_leaves)
    if state.dtype not in DTYPES or state.dtype.itemsize != state.layout.element_bytes:
        raise ValueError(
            f"state.dtype must be one of {', '.join(map(str, DTYPES))}, of "
            f"{state.layout.element_bytes} bytes as the layout says, got {state.dtype}"
        )
    i32 = torch.int32
    for name, dtype, shape in (
        ("pages", torch.uint8, (state.num_pages, state.layout.page_bytes)),
        ("free_ring", i32, (state.num_pages,)),
        ("ring_ends", torch.int64, (2,)),
        ("leaves", i32, (leaves, state.leaf_entries)),
        ("free_leaves", i32, (leaves,)),
        ("leaf_ends", torch.int64, (2,)),
        ("directory", i32, (num_slots, layers, heads, width)),
        ("num_tokens", i32, (num_slots, layers, heads, 2)),
        ("num_pages_held", i32, (num_slots, layers, heads, 2)),
        ("thresholds", torch.float32, (num_slots, 2)),
        ("prompt_lens", i32, (num_slots,)),
        ("overruns", i32, (1,)),
    ):
        check_tensor(f"state.{name}", getattr(state, name), device, dtype, *shape)
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        multiprocessors = INTERPRETED_MULTIPROCESSORS
    tuning = Tuning(fast=device.type == "cuda")
    table = Table(state.directory_width, state.leaf_entries)
    return Workspace(tiers_of(state.layout), table, device, num_slots, multiprocessors, tuning)
