"""The compiled functions, with their argument types, and a pool as they see it."""

import ctypes
import functools
import weakref
from collections.abc import Callable, Mapping
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from diffkv.kernels.cpu.build import load_library
from diffkv.layout import PageLayout
from diffkv.policy import SCORED_QUERIES
from diffkv.quant import BITS, CUT_WIDTHS, FLOAT16_MAX, MIN_SCALE, OUTER, cut_of
from diffkv.state import PoolState

__all__ = ["DTYPES", "Handle", "attend_function", "check_status", "handle", "vectors_library"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the models' dtypes, as in csrc/element.h."""

VECTOR_SOURCES = ("quantize.cpp", "rotate.cpp", "significance.cpp")
PAGE_SOURCES = ("store.cpp", "plan.cpp")
ATTEND_SOURCES = ("attend.cpp",)

VECTOR_FUNCTIONS = {
    "quantize": (c_void_p, c_int64, *(c_int,) * 4, c_void_p, c_void_p, c_int),
    "dequantize": (c_void_p, c_void_p, c_int64, *(c_int,) * 4, c_void_p, c_int),
    "rotate": (
        c_void_p, *(c_int64,) * 2, *(c_int,) * 4, c_void_p, c_int, c_void_p, c_int64, c_int,
    ),
    "significance": (
        c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, *(c_int64,) * 3, *(c_int,) * 3,
        c_float, c_int, c_void_p, c_int,
    ),
}  # fmt: skip

PAGE_FUNCTIONS = {
    "store_prompt": (
        c_void_p, c_int64, c_void_p, c_void_p, c_int64, *(c_void_p, c_int64) * 2,
        c_void_p, c_void_p, c_void_p, c_int64, c_int,
    ),
    "gather": (c_void_p, *(c_int64,) * 3, *(c_void_p,) * 4, c_int),
    "release": (c_void_p, c_void_p, c_int64, c_int64, c_int),
    "plan_decode": (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int),
    "append": (
        c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, *(c_void_p, c_int64) * 2, c_int,
    ),
}  # fmt: skip

ATTEND_FUNCTIONS = {
    "attend": (c_void_p, c_int64, c_void_p, c_int64, *(c_void_p, c_int64) * 2, c_float, c_int),
}

TIER_FIELDS = (
    "tracked", "tokens_per_page", "k_bits", "k_groups", "k_code_bytes", "v_bits", "v_groups",
    "v_code_bytes", "k_codes", "k_meta", "v_codes", "v_meta", "sums", "positions",
)  # fmt: skip

STATUS_ERRORS = {
    1: "the page table is full: a request keeps more tokens than its table was made for",
    2: "max_tokens must be at least as many as any head keeps",
}
"""What the numbers of `Status` in csrc/pool.h mean."""


class Pool(ctypes.Structure):
    """Mirrors `Pool` in csrc/pool.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "pages", "free_ring", "ring_ends", "leaves", "free_leaves", "leaf_ends", "directory",
            "num_tokens", "num_pages_held", "thresholds", "prompt_lens", "overruns",
        )),
        *((name, c_int64) for name in (
            "num_pages", "num_leaves", "num_layers", "num_kv_heads", "directory_width",
            "leaf_shift", "window",
        )),
    )  # fmt: skip


class Handle(NamedTuple):
    """What an operation needs of a state, made once.

    Attributes:
        library: the functions compiled for its layout and dtype.
        address: of its Pool.
        num_kv_heads: H.
        head_dim: elements of a vector.
        dtype: the model's.
        attend: the function for each size of a query group that was asked for.
        pool: keeps the Pool alive.
    """

    library: ctypes.CDLL
    address: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    attend: dict[int, Callable[..., int]]
    pool: Pool


def render_quantiser() -> str:
    """The text of constants.h where there are no pages: what all codes are made with."""
    bits = [bits for bits in sorted(BITS) if any(cut_of(bits, width) for width in CUT_WIDTHS)]
    assert bits == list(range(1, len(bits) + 1)), "C++ finds a row by bits - 1"
    rows = (", ".join(f"{cut_of(each, width)!r}f" for width in CUT_WIDTHS) for each in bits)
    return (
        "#pragma once\n"
        f"constexpr float FLOAT16_MAX = {FLOAT16_MAX!r}f;\n"
        f"constexpr float MIN_SCALE = {MIN_SCALE!r}f;\n"
        f"constexpr float OUTER = {OUTER!r}f;\n"
        f"constexpr int CUT_WIDTHS = {len(CUT_WIDTHS)};\n"
        f"constexpr float CUTS[][CUT_WIDTHS] = {{{', '.join(f'{{{row}}}' for row in rows)}}};\n"
    )


def render(layout: PageLayout, dtype: torch.dtype, group: int | None = None) -> str:
    """The text of constants.h: also a page layout, and the query heads of a KV head."""
    rows = []
    for tier in layout.tiers:
        values = (
            getattr(tier, name) if hasattr(tier, name) else getattr(tier.format, name)
            for name in TIER_FIELDS
        )
        rows.append(f"    {{{', '.join(str(int(x)) for x in values)}}},  // {tier.format}\n")
    return (
        f"{render_quantiser()}"
        "namespace layout {\n"
        f"constexpr int HEAD_DIM = {layout.head_dim};\n"
        f"constexpr int PAGE_BYTES = {layout.page_bytes};\n"
        f"constexpr int DTYPE = {DTYPES[dtype]};\n"
        f"constexpr int SCORED_QUERIES = {SCORED_QUERIES};\n"
        + (f"constexpr int GROUP = {group};\n" if group else "")
        + f"struct Tier {{\n  int {', '.join(TIER_FIELDS)};\n}};\n"
        f"constexpr Tier TIERS[] = {{\n{''.join(rows)}}};\n"
        "}  // namespace layout\n"
    )


def _declare(
    library: ctypes.CDLL, functions: Mapping[str, tuple[type, ...]], restype: type | None
) -> ctypes.CDLL:
    for name, argtypes in functions.items():
        function = getattr(library, f"diffkv_{name}")
        function.argtypes = argtypes
        function.restype = restype
        setattr(library, name, function)
    return library


@functools.cache
def vectors_library() -> ctypes.CDLL:
    """The functions that know no page: quantize, dequantize, rotate, significance."""
    return _declare(load_library(VECTOR_SOURCES, render_quantiser()), VECTOR_FUNCTIONS, None)


@functools.cache
def pages_library(layout: PageLayout, dtype: torch.dtype) -> ctypes.CDLL:
    """The functions compiled for one page layout and one dtype of a model."""
    return _declare(load_library(PAGE_SOURCES, render(layout, dtype)), PAGE_FUNCTIONS, c_int)


@functools.cache
def _attend_library(layout: PageLayout, dtype: torch.dtype, group: int) -> ctypes.CDLL:
    return _declare(
        load_library(ATTEND_SOURCES, render(layout, dtype, group)), ATTEND_FUNCTIONS, c_int
    )


def attend_function(state: PoolState, pool: Handle, group: int) -> Callable[..., int]:
    """The attention of a state for query groups of one size, compiled when it is first asked for."""
    function = pool.attend.get(group)
    if function is None:
        function = _attend_library(state.layout, state.dtype, group).attend
        pool.attend[group] = function
    return function


_handles: dict[int, tuple[weakref.ref[PoolState], Handle]] = {}


def handle(state: PoolState) -> Handle:
    """The handle of a state, which is checked when it is first seen.

    Raises:
        ValueError: a tensor of the state is not what `PoolState` says.
    """
    found = _handles.get(id(state))
    if found is not None:
        return found[1]
    made = _make_handle(state)
    key = id(state)
    # Pointers are kept by identity, and forgotten with the state: an id may be used again
    _handles[key] = (weakref.ref(state, lambda _: _handles.pop(key, None)), made)
    return made


def check_status(status: int) -> None:
    """Raise ValueError if an operation refused."""
    if status:
        raise ValueError(STATUS_ERRORS[status])


def _make_handle(state: PoolState) -> Handle:
    layout = state.layout
    if state.dtype not in DTYPES:
        raise ValueError(
            f"state.dtype must be one of {', '.join(map(str, DTYPES))}, got {state.dtype}"
        )
    if state.dtype.itemsize != layout.element_bytes:
        raise ValueError(
            f"state.layout must be derived for elements of {state.dtype.itemsize} bytes "
            f"({state.dtype}), got element_bytes {layout.element_bytes}"
        )
    table, num_leaves = state.directory.shape, len(state.free_leaves)
    slots = table[0]
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "pages": (torch.uint8, (state.num_pages, layout.page_bytes)),
        "free_ring": (torch.int32, (state.num_pages,)),
        "ring_ends": (torch.int64, (2,)),
        "leaves": (torch.int32, (num_leaves, state.leaf_entries)),
        "free_leaves": (torch.int32, (num_leaves,)),
        "leaf_ends": (torch.int64, (2,)),
        "directory": (torch.int32, tuple(table)),
        "num_tokens": (torch.int32, (*table[:3], 2)),
        "num_pages_held": (torch.int32, (*table[:3], 2)),
        "thresholds": (torch.float32, (slots, 2)),
        "prompt_lens": (torch.int32, (slots,)),
        "overruns": (torch.int32, (1,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor: Tensor = getattr(state, name)
        got = (tensor.dtype, tuple(tensor.shape), tensor.device.type, tensor.is_contiguous())
        if got != (dtype, shape, "cpu", True):
            raise ValueError(
                f"state.{name} must be a contiguous CPU tensor {list(shape)} {dtype}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
            )
    pool = Pool(
        *(getattr(state, name).data_ptr() for name in expected),
        state.num_pages, num_leaves, state.num_layers, state.num_kv_heads, state.directory_width,
        state.leaf_entries.bit_length() - 1, state.window,
    )  # fmt: skip
    library = pages_library(layout, state.dtype)
    address = ctypes.addressof(pool)
    return Handle(library, address, state.num_kv_heads, layout.head_dim, state.dtype, {}, pool)
