"""Rotating by a product, against the reference."""

import pytest
import torch

from diffkv import reference
from diffkv.kernels import triton as kernels
from diffkv.rotation import signs

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative to the largest element: one rounding of a sum."""


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("inverse", [False, True], ids=["there", "back"])
def test_rotate(dtype, head_dim, inverse):
    x = torch.randn(7, 3, head_dim).to(dtype)
    expected, out = torch.empty_like(x), torch.empty_like(x)
    reference.rotate(x, signs(head_dim), inverse, expected)
    kernels.rotate(x, signs(head_dim), inverse, out)
    atol = ROUNDING[dtype] * float(expected.float().abs().max())
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)


def test_rows_may_be_apart_and_in_place():
    qkv = torch.randn(9, 5, 64)
    x, before, expected = qkv[:, 1:3], qkv.clone(), torch.empty(9, 2, 64)
    reference.rotate(x, signs(64), False, expected)
    kernels.rotate(x, signs(64), False, x)
    torch.testing.assert_close(x, expected)
    assert torch.equal(qkv[:, 0], before[:, 0]) and torch.equal(qkv[:, 3:], before[:, 3:])
    kernels.rotate(qkv[:0, 1:3], signs(64), False, qkv[:0, 1:3])
