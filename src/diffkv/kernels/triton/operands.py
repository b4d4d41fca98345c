"""Device functions: codes and queries as the numbers that matrix products take.

Codes are not converted: masks take them out of a word, and what is left of its bits is a number. Below
the normal ones, a float16 number is its bits times 2 ** -24.
"""

import triton
import triton.language as tl

__all__ = [
    "DIGIT",
    "ROOM",
    "STEPS",
    "codes_as_float16",
    "codes_as_int8",
    "digits",
    "word_codes_as_float16",
]

STEPS = tl.constexpr(2.0**14)
"""Whole numbers that the range of a query's largest power of two is divided into."""

DIGIT = tl.constexpr(256)
"""What an upper digit stands for."""

ROOM = tl.constexpr(1.0 + 2.0**-7)
"""Largest elements so much below the next power of two take that one: their upper digit would be 128."""


@triton.jit
def codes_as_float16(x, PLANE: tl.constexpr, S: tl.constexpr, FAST: tl.constexpr):
    """uint8 -> float16 code * 2 ** (PLANE * bits - 24); FAST turns four bytes into two words."""
    MASK: tl.constexpr = ((1 << S.bits) - 1) << (PLANE * S.bits)
    if FAST:
        if S.bits == 8:
            y = tl.inline_asm_elementwise(
                "prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;",
                "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            TWO: tl.constexpr = MASK * 0x00010001
            y = tl.inline_asm_elementwise(
                "{ .reg .b32 t, u; prmt.b32 t, $2, 0, 0x4140; prmt.b32 u, $2, 0, 0x4342; "
                f"and.b32 $0, t, {TWO}; and.b32 $1, u, {TWO}; }}",
                "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        y = (x & MASK).to(tl.uint16).to(tl.float16, bitcast=True)
    return y


@triton.jit
def codes_as_int8(x, PLANE: tl.constexpr, S: tl.constexpr, FAST: tl.constexpr):
    """uint8 -> int8 code, less 128 where it has 8 bits; FAST takes four at a time."""
    MASK: tl.constexpr = (1 << S.bits) - 1
    SHIFT: tl.constexpr = PLANE * S.bits
    if FAST:
        FOUR: tl.constexpr = MASK * 0x01010101
        if S.bits == 8:
            y = tl.inline_asm_elementwise(
                "xor.b32 $0, $1, 0x80808080;", "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4
            )
        elif PLANE == 0:
            y = tl.inline_asm_elementwise(
                f"and.b32 $0, $1, {FOUR};", "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            y = tl.inline_asm_elementwise(
                f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 $0, t, {FOUR}; }}",
                "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
    elif S.bits == 8:
        y = (x ^ 0x80).to(tl.int8, bitcast=True)
    else:
        y = ((x >> SHIFT) & MASK).to(tl.int8)
    return y


@triton.jit
def word_codes_as_float16(x, PART: tl.constexpr, S: tl.constexpr, FAST: tl.constexpr):
    """Like `codes_as_float16`, of one part of words of two bytes: code * `S.units[PART]`."""
    PLACE: tl.constexpr = S.places[PART]
    SHIFT: tl.constexpr = PART % 2 * 8 + PART // 2 * S.bits - PLACE
    MASK: tl.constexpr = ((1 << S.bits) - 1) << PLACE
    if FAST:
        TWO: tl.constexpr = MASK * 0x00010001
        if S.bits == 8:
            PICK: tl.constexpr = 0x4240 + 0x0101 * PART
            y = tl.inline_asm_elementwise(
                f"prmt.b32 $0, $1, 0, {PICK};",
                "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            y = tl.inline_asm_elementwise(
                f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 $0, t, {TWO}; }}",
                "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        code = (x.to(tl.uint16, bitcast=True) >> SHIFT) & MASK
        y = code.to(tl.float16, bitcast=True)
    return y


@triton.jit
def digits(x):
    """[elements, heads] whole numbers to [elements, 2 * heads] int8 digits: upper and lower ones."""
    number = tl.trans(x).to(tl.int32)  # elements side by side, as a product reads them
    upper = (number + DIGIT // 2) >> 8
    lower = number - upper * DIGIT
    is_upper = tl.arange(0, 2)[None, :, None] == 0
    both = tl.where(is_upper, upper[:, None, :], lower[:, None, :])
    return tl.trans(tl.reshape(both, [2 * x.shape[1], x.shape[0]]).to(tl.int8))
