import pytest
import torch
from make import DTYPES

from diffkv import reference
from diffkv.kernels import triton as kernels


def edge_vectors(num, head_dim, dtype):
    """Random vectors, and one of each kind that divides by nothing or does not fit float16."""
    x = (torch.randn(num + 6, head_dim) * 3).to(dtype)
    x[num] = 1.5
    x[num + 1, 0] = float("nan")
    x[num + 2, 1] = float("inf")
    x[num + 3, head_dim - 1] = float("-inf")
    x[num + 4] = 0
    x[num + 5] *= 1e-6
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_quantize_is_bit_exact(head_dim, bits, dtype):
    for groups, num in ((1, 1), (2, 11), (4, 33)):
        x = edge_vectors(num, head_dim, dtype)
        codes, meta = kernels.quantize(x, bits, groups)
        expected_codes, expected_meta = reference.quantize(x, bits, groups)
        assert torch.equal(meta, expected_meta)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(
            kernels.dequantize(codes, meta, bits, dtype),
            reference.dequantize(codes, meta, bits, dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bits_keep_the_bytes(dtype):
    x = torch.randn(3, 64).to(dtype)
    codes, meta = kernels.quantize(x, 16, 1)
    assert torch.equal(codes, reference.quantize(x, 16, 1)[0])
    assert meta.shape == (3, 0, 2)
    assert torch.equal(kernels.dequantize(codes, meta, 16, dtype), x)


def test_no_vectors():
    codes, meta = kernels.quantize(torch.empty(0, 64), 4, 2)
    assert codes.shape == (0, 32) and meta.shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("x", "bits", "message"),
    [(torch.zeros(64, 2).T, 4, "x must be a contiguous"), (torch.zeros(2, 60), 4, "head_dim"),
     (torch.zeros(2, 64), 3, "bits must be"), (torch.zeros(2, 64).double(), 4, "dtype must be")],
)  # fmt: skip
def test_wrong_arguments_are_named(x, bits, message):
    with pytest.raises(ValueError, match=message):
        kernels.quantize(x, bits, 1)
