"""Codes and meta agree with the reference bit for bit, and the grid is as fine as it should be."""

import pytest
import torch
from make import DTYPES
from torch import Tensor

from diffkv import reference
from diffkv.quant import FLOAT16_MAX, MIN_SCALE

INF = float("inf")


def awkward_vectors(num_random: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Random vectors of several magnitudes, then one of every kind that rounds or saturates."""
    scales = torch.logspace(-6, 4, num_random)[:, None]
    random = torch.randn(num_random, head_dim) * scales + torch.randn(num_random, 1) * scales
    special = torch.randn(9, head_dim)
    special[0] = 3.0
    special[1] = 0.0
    special[2, 1::3] = torch.nan
    special[3, 0], special[3, 1] = INF, -INF
    special[4] *= 1e30 if dtype != torch.float16 else 6e4
    special[5] *= 1e-30
    special[6] = -INF
    special[7] = torch.nan
    special[8] = torch.arange(head_dim) / 7
    return torch.cat([random, special]).to(dtype)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [*zip([8, 64, 72, 80, 96, 128], DTYPES * 2, strict=True), (256, DTYPES[1])],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantize_is_bit_exact(kernels, bits, groups, head_dim, dtype):
    x = awkward_vectors(30 if kernels.is_slow else 400, head_dim, dtype)

    codes, meta = kernels.quantize(x, bits, groups)
    expected_codes, expected_meta = reference.quantize(x, bits, groups)

    assert_same_bits(meta, expected_meta)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(
        kernels.dequantize(codes, meta, bits, dtype), reference.dequantize(codes, meta, bits, dtype)
    )


def test_no_vectors(backend):
    codes, meta = backend.quantize(torch.zeros(0, 64), 4, 2)

    assert (codes.shape, meta.shape) == ((0, 32), (0, 2, 2))
    assert backend.dequantize(codes, meta, 4, torch.float32).shape == (0, 64)


@pytest.mark.parametrize("num", [1, 7])
@pytest.mark.parametrize("bits", [1, 8])
def test_few_vectors(kernels, bits, num):
    x = torch.randn(num, 64)

    for got, want in zip(kernels.quantize(x, bits, 2), reference.quantize(x, bits, 2), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bits_keep_the_bytes(backend, dtype):
    x = awkward_vectors(3, 80, dtype)

    codes, meta = backend.quantize(x, 16, 1)

    assert_same_bits(codes, reference.quantize(x, 16, 1)[0])
    assert meta.shape == (len(x), 0, 2)
    assert_same_bits(backend.dequantize(codes, meta, 16, dtype), x)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_round_trip_error_is_half_a_step(backend, groups):
    """|x - x'| <= scale / 2 with 8 bits, plus what rounding scale and zero to float16 can move the ends.

    Inside the grid, the nearest point is at most half a step away. The grid starts at the rounded
    zero, off by at most 2^-11 |zero| (2^-25 where it is subnormal), and ends 255 rounded steps
    later, off by another 2^-11 255 scale. Float32 rounding of the result adds 2^-23 |x|.
    """
    x = torch.cat([torch.randn(500, 128) * torch.logspace(-3, 3, 500)[:, None], torch.ones(1, 128)])

    codes, meta = backend.quantize(x, 8, groups)
    error = (backend.dequantize(codes, meta, 8, torch.float32) - x).abs().view(len(x), groups, -1)

    scale, zero = meta.float().unbind(-1)
    ends = zero.abs() * 2**-11 + 2**-25 + 255 * scale * 2**-11
    rounding = x.abs().amax(-1, keepdim=True) * 2**-22
    assert (error <= (scale / 2 + ends + rounding)[..., None]).all()
    assert (scale >= MIN_SCALE).all()
    assert meta.isfinite().all()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_have_no_bias(backend, bits, groups):
    """A group's mean stays, and so does its length along itself: to a thousandth of its range."""
    num = 50 if backend.is_slow else 500
    x = torch.randn(num, 128) * torch.logspace(-2, 3, num)[:, None] + torch.randn(num, 1)
    back = backend.dequantize(*backend.quantize(x, bits, groups), bits, torch.float32)

    x, back = x.view(num, groups, -1), back.view(num, groups, -1)
    span = x.amax(-1) - x.amin(-1)
    offset = x.abs().amax(-1) * 2**-10  # what rounding zero to float16 moves all elements by
    assert ((x.mean(-1) - back.mean(-1)).abs() <= span * 1e-3 + offset).all()
    own, given = (y - y.mean(-1, keepdim=True) for y in (x, back))
    along = (own * given).mean(-1) / own.square().mean(-1)
    assert (along - 1).abs().max() < 2e-3


@pytest.mark.parametrize(("bits", "least"), [(1, 0.60), (2, 0.87), (4, 0.989)])
def test_few_bits_are_for_where_the_elements_are(backend, bits, least):
    """The whole range would leave twice the share of the variance out with two bits."""
    x = torch.randn(500, 128)
    back = backend.dequantize(*backend.quantize(x, bits, 1), bits, torch.float32)
    assert torch.corrcoef(torch.stack([x.flatten(), back.flatten()]))[0, 1].square() > least


@pytest.mark.parametrize("values", [(-1.0, 1.0), (-3.0, -1.0, 1.0, 3.0)])
def test_few_values_stay(backend, values):
    """As of a vector with one outlier, or some, after its rotation."""
    x = torch.tensor(values)[torch.arange(128) % len(values)][None]
    back = backend.dequantize(*backend.quantize(x, 2, 1), 2, torch.float32)
    assert torch.allclose(back, x, rtol=1e-3)


def test_values_beyond_float16_saturate(backend):
    x = torch.full((1, 8), 1e9)
    x[0, 0] = -1e9

    back = backend.dequantize(*backend.quantize(x, 8, 1), 8, torch.float32)

    assert back[0, 0] == -FLOAT16_MAX
    assert (back[0, 1:] - FLOAT16_MAX).abs().max() <= FLOAT16_MAX * 2**-10


@pytest.mark.parametrize(
    ("x", "bits", "groups", "word"),
    [
        (torch.zeros(2, 64)[:, ::2], 8, 1, "contiguous"),
        (torch.zeros(2, 64, dtype=torch.float64), 8, 1, "float64"),
        (torch.zeros(2, 64), 3, 1, "bits"),
        (torch.zeros(2, 64), 8, 3, "groups"),
        (torch.zeros(2, 12), 8, 1, "head_dim"),
    ],
)
def test_wrong_calls_are_refused(kernels, x, bits, groups, word):
    with pytest.raises(ValueError, match=word):
        kernels.quantize(x, bits, groups)
