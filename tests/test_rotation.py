"""The rotation changes nothing that attends, and spreads outliers."""

import pytest
import torch
from torch import Tensor

from diffkv import ops, pool
from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.layout import PageLayout
from diffkv.policy import Thresholds
from diffkv.quant import ConfigError, QuantConfig
from diffkv.reference.quantize import dequantize, quantize
from diffkv.rotation import block_size, choose, hadamard_matrix, signs_of
from diffkv.shape import PoolShape

KV_HEADS, GROUP = 2, 3
CHUNKS, NEW = (90, 60), 24
OUTLIER = 30.0


@pytest.mark.parametrize(
    ("head_dim", "size"), [(64, 64), (80, 16), (96, 32), (128, 128), (256, 256)]
)
def test_is_orthogonal_and_spreads(head_dim: int, size: int) -> None:
    matrix = hadamard_matrix(head_dim)
    assert block_size(head_dim) == size
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim))
    # one channel, and a constant over all of them: neither is one channel afterwards
    for vector in (torch.eye(head_dim)[3], torch.full((head_dim,), head_dim**-0.5)):
        assert (vector @ matrix).abs().max() < 4 * size**-0.5


@pytest.mark.parametrize(("bits", "share"), [(2, 0.8), (4, 0.25), (8, 0.25)])
def test_outliers_cost_less(bits: int, share: float) -> None:
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= OUTLIER
    matrix = hadamard_matrix(128)

    def error(vectors: Tensor, back: Tensor) -> float:
        stored = dequantize(*quantize(vectors, bits, 1), bits, torch.float32)
        return float((stored @ back - x).square().mean())

    assert error(x @ matrix, matrix.T) < share * error(x, torch.eye(128))


def _decode(head_dim: int, quant: str, rotate: str, outlier: float, alpha: float) -> Tensor:
    """Outputs of a prompt in two chunks and of the tokens after it."""
    generator = torch.Generator().manual_seed(1)
    layout = PageLayout.derive(QuantConfig.parse(quant), head_dim, element_bytes=4, drops=True)
    num_tokens = sum(CHUNKS) + NEW
    shape = PoolShape.fit(8 << 20, layout, 1, KV_HEADS, num_tokens, 2)
    buffer = torch.zeros(8 << 20, dtype=torch.uint8)
    state = pool.create(shape, buffer, torch.float32, window=16)
    signs = signs_of(rotate, head_dim, buffer.device)
    kernels = ops.load("cpu", None)
    cache = DiffKVCache(state, kernels, head_dim**-0.5, signs=signs)
    cache.open(0, sum(CHUNKS), Thresholds(alpha, alpha))
    slots, none = torch.zeros(1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    outputs, length = [], 0
    for tokens in (*CHUNKS, *[1] * NEW):
        q, k, v = (
            torch.randn(tokens, heads, head_dim, generator=generator)
            for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
        )
        k[..., 7] *= outlier
        q[..., 7] /= outlier
        if length < sum(CHUNKS):
            chunk = PromptChunk(0, slice(0, tokens), length, sum(CHUNKS))
            step = cache.plan([chunk], slice(0, 0), none, none)
        else:
            step = cache.plan([], slice(0, 1), slots, torch.tensor([length + 1], dtype=torch.int32))
        output = torch.empty_like(q)
        cache.attend(0, step, q, k, v, output)
        outputs.append(output)
        length += tokens
    return torch.cat(outputs)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_nothing_attends_otherwise(head_dim: int) -> None:
    plain, rotated = (
        _decode(head_dim, "k16v16", rotate, 1.0, 0.6) for rotate in ("none", "hadamard")
    )
    torch.testing.assert_close(rotated, plain, rtol=1e-4, atol=1e-5)


def test_four_bits_survive_outliers() -> None:
    exact = _decode(128, "k16v16", "none", OUTLIER, 0.0)
    plain, rotated = (
        float((_decode(128, "k4v4", rotate, OUTLIER, 0.0) - exact).square().mean())
        for rotate in ("none", "hadamard")
    )
    assert rotated < 0.5 * plain


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="rotate must be none or hadamard, got 'givens'"):
        choose("givens", QuantConfig.parse("k8v4"))


@pytest.mark.parametrize(
    ("quant", "rotation"),
    [
        ("k16v16", "none"),
        ("k8v4-k4v2", "hadamard"),
        ("k16v8", "hadamard"),
        ("k16v16-k8v8", "hadamard"),
    ],
)
def test_what_is_quantised_is_rotated(quant: str, rotation: str) -> None:
    assert choose(None, QuantConfig.parse(quant)) == rotation
    assert choose("none", QuantConfig.parse(quant)) == "none"
