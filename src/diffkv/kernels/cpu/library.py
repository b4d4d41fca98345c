"""The compiled functions, with their argument types, and a pool as they see it."""

import ctypes
import functools
from collections.abc import Callable, Mapping
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch

from diffkv.kernels.by_state import by_state
from diffkv.kernels.check import check_state
from diffkv.kernels.cpu.build import load_library
from diffkv.layout import PageLayout
from diffkv.policy import SCORED_QUERIES
from diffkv.quant import (
    BITS,
    CUT_WIDTHS,
    FLOAT16_MAX,
    MIN_SCALE,
    OUTER,
    STEPS,
    STRETCHED_BITS,
    cut_of,
)
from diffkv.state import TENSORS, PoolState

__all__ = [
    "CPU",
    "DTYPES",
    "Handle",
    "attend_function",
    "check_status",
    "handle",
    "vectors_library",
]

CPU = torch.device("cpu")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the models' dtypes, as in csrc/element.h."""

VECTOR_SOURCES = ("quantize.cpp", "rotate.cpp", "significance.cpp", "decide.cpp")
PAGE_SOURCES = ("store.cpp", "plan.cpp", "report.cpp", "centre.cpp")
ATTEND_SOURCES = ("attend.cpp",)

VECTOR_FUNCTIONS = {
    "quantize": (c_void_p, c_int64, *(c_int,) * 4, c_void_p, c_void_p, c_int),
    "dequantize": (c_void_p, c_void_p, c_int64, *(c_int,) * 4, c_void_p, c_int),
    "rotate": (
        c_void_p, *(c_int64,) * 2, *(c_int,) * 4, c_void_p, c_int, c_void_p, c_int64, c_int,
    ),
    "significance": (
        c_void_p, c_int64, c_void_p, c_int64, *(c_void_p,) * 3, *(c_int64,) * 3, *(c_int,) * 3,
        c_float, c_int, c_void_p, c_int64, c_void_p, c_int,
    ),
    "decide_rows": (
        c_void_p, c_void_p, c_int64, c_void_p, c_void_p, *(c_int64,) * 3, c_void_p, c_int64, c_int64,
        c_int,
    ),
}  # fmt: skip

PAGE_FUNCTIONS = {
    "store_prompt": (
        c_void_p, c_int64, c_void_p, c_void_p, c_int64, *(c_void_p, c_int64) * 2,
        c_void_p, c_void_p, c_void_p, c_int64, c_int,
    ),
    "centre_rows": (
        c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int,
    ),
    "gather": (
        c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, *(c_void_p, c_int64) * 2,
        c_void_p, c_int,
    ),
    "release": (c_void_p, c_void_p, c_int64, c_int64, c_int),
    "report": (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int),
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
    2: "starts must leave each row, in order, a place for as many tokens as any of its heads keeps",
    3: "slots and starts must not be negative",
}
"""Messages of the numbers of `Status` in csrc/pool.h."""


SIZES = (
    "num_pages",
    "num_leaves",
    "num_layers",
    "num_kv_heads",
    "directory_width",
    "chain_width",
    "leaf_shift",
    "window",
)
"""Attributes of a state that its C++ struct has, too."""

C_TYPES = {
    torch.uint8: "uint8_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.float32: "float",
    torch.bfloat16: "uint16_t",
}


class Pool(ctypes.Structure):
    """A state as C++ sees it: the struct `Tensors` of `render`, field by field."""

    _fields_ = (*((name, c_void_p) for name in TENSORS), *((name, c_int64) for name in SIZES))


class Handle(NamedTuple):
    """A state as operations need it, made once.

    Attributes:
        library: the functions compiled for its layout and dtype.
        address: address of its Pool.
        attend: the function for each size of a query group that was asked for.
        pool: keeps the Pool alive.
    """

    library: ctypes.CDLL
    address: int
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
        f"constexpr float STEPS = {STEPS}.0f;\n"
        f"constexpr int STRETCHED_BITS = {STRETCHED_BITS};\n"
        f"constexpr int CUT_WIDTHS = {len(CUT_WIDTHS)};\n"
        f"constexpr float CUTS[][CUT_WIDTHS] = {{{', '.join(f'{{{row}}}' for row in rows)}}};\n"
    )


def render(layout: PageLayout, dtype: torch.dtype, group: int | None = None) -> str:
    """The text of constants.h: also a page layout, a pool, and the query heads of a KV head."""
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
        f"constexpr bool CENTRED = {int(layout.centred)};\n"
        f"constexpr int SCORED_QUERIES = {SCORED_QUERIES};\n"
        + (f"constexpr int GROUP = {group};\n" if group else "")
        + f"struct Tier {{\n  int {', '.join(TIER_FIELDS)};\n}};\n"
        f"constexpr Tier TIERS[] = {{\n{''.join(rows)}}};\n"
        "}  // namespace layout\n"
        f"{_render_tensors()}"
    )


def _render_tensors() -> str:
    """The struct of a pool's tensors and sizes."""
    pointers = (
        f"  {C_TYPES[spec.dtype]}* {name};  // [{spec.shape.replace(' ', ', ')}] {spec.meaning}\n"
        for name, spec in TENSORS.items()
    )
    sizes = f"  int64_t {', '.join(SIZES)};\n"
    return f"#include <cstdint>\nstruct Tensors {{\n{''.join(pointers)}{sizes}}};\n"


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
    """The functions that know no page: quantize, dequantize, rotate, significance, decide_rows."""
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


def check_status(status: int) -> None:
    """Raise ValueError if an operation refused."""
    if status:
        raise ValueError(STATUS_ERRORS[status])


@by_state
def handle(state: PoolState) -> Handle:
    """The handle of a state, which is checked when it is first seen.

    Raises:
        ValueError: a tensor of the state is not what `TENSORS` says.
    """
    check_state(state, CPU)
    pool = Pool(
        *(getattr(state, name).data_ptr() for name in TENSORS),
        *(getattr(state, name) for name in SIZES),
    )
    library = pages_library(state.layout, state.dtype)
    return Handle(library, ctypes.addressof(pool), {}, pool)
