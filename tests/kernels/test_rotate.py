"""Rotating: in float32 the product with the matrix, in other dtypes the reference up to rounding."""

import pytest
import torch
from make import DTYPES

from diffkv import reference
from diffkv.rotation import hadamard_matrix, signs

HEAD_DIMS = (8, 64, 72, 80, 96, 128, 192, 256, 1024)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative to the largest element: one rounding of a sum."""


def skip_what_no_gpu_holds(backend, head_dim):
    if backend.device == "cuda" and head_dim > 256:
        pytest.skip("a matrix of that size does not fit a GPU's shared memory")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_is_the_matrix(backend, head_dim):
    skip_what_no_gpu_holds(backend, head_dim)
    x = torch.randn(5, 3, head_dim)
    out = torch.empty_like(x)
    backend.rotate(x, signs(head_dim), False, out)
    torch.testing.assert_close(out, x @ hadamard_matrix(head_dim), rtol=1e-5, atol=1e-5)
    backend.rotate(out, signs(head_dim), True, out)
    torch.testing.assert_close(out, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("inverse", [False, True], ids=["there", "back"])
@pytest.mark.parametrize(
    ("shape", "dtype"), zip([(1, 1), (7, 3), (100, 2), (0, 4)], [*DTYPES, DTYPES[0]], strict=True)
)
def test_is_the_reference(kernels, dtype, head_dim, inverse, shape):
    skip_what_no_gpu_holds(kernels, head_dim)
    x = torch.randn(*shape, head_dim).to(dtype)
    expected, out = torch.empty_like(x), torch.empty_like(x)
    reference.rotate(x, signs(head_dim), inverse, expected)
    kernels.rotate(x, signs(head_dim), inverse, out)
    largest = float(expected.float().abs().max()) if x.numel() else 1.0
    # The CPU's kernel rounds an element of 16 bits where the reference may round the other way
    torch.testing.assert_close(out, expected, rtol=0, atol=ROUNDING[dtype] * largest)


def test_rows_may_be_apart_and_in_place(backend):
    qkv = torch.randn(9, 5, 64)
    x = qkv[:, 1:3]
    expected, before = torch.empty(9, 2, 64), qkv.clone()
    backend.rotate(x, signs(64), False, expected)
    backend.rotate(x, signs(64), False, x)
    assert torch.equal(x, expected)
    assert torch.equal(qkv[:, 0], before[:, 0]) and torch.equal(qkv[:, 3:], before[:, 3:])


def test_wrong_tensors_are_refused(kernels):
    x = torch.randn(2, 3, 64)
    with pytest.raises(ValueError, match="out must be"):
        kernels.rotate(x, signs(64), False, torch.empty(2, 3, 32))
    with pytest.raises(ValueError, match="signs must be"):
        kernels.rotate(x, signs(32), False, x)


def test_head_dims_the_cpu_does_not_know_are_refused():
    from diffkv.kernels import cpu

    with pytest.raises(ValueError, match="multiple of 8"):
        cpu.rotate(torch.randn(2, 3, 20), signs(20), False, torch.empty(2, 3, 20))
