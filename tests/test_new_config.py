"""Adding a format is writing its name: this one is named in no other file."""

import re
from pathlib import Path

import pytest
import torch

from diffkv import ops, pool
from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.layout import PageLayout
from diffkv.policy import Thresholds
from diffkv.quant import QuantConfig
from diffkv.shape import PoolShape
from diffkv.state import PoolState

ROOT = Path(__file__).parents[1]
UNKNOWN = "k8v2g4x1-k4v1g1x4"
HEAD_DIM, LAYERS, KV_HEADS, GROUP = 64, 2, 2, 3
PROMPT, NEW = 150, 40


def test_no_other_file_names_it() -> None:
    names = [
        path
        for folder in ("src", "tests", "docs", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".md", ".sh", ".toml"}
        and UNKNOWN in path.read_text()
    ]
    assert names == [Path(__file__)]


def _run(kernels: str | None) -> tuple[torch.Tensor, PoolState]:
    """Prompt, decode and release on one set of kernels; outputs of all decode steps."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, HEAD_DIM, generator=generator)

    layout = PageLayout.derive(QuantConfig.parse(UNKNOWN), HEAD_DIM, element_bytes=4, drops=True)
    budget = 2 << 20
    shape = PoolShape.fit(budget, layout, LAYERS, KV_HEADS, PROMPT + NEW, 2)
    buffer = torch.zeros(budget, dtype=torch.uint8)
    state = pool.create(shape, buffer, torch.float32, window=16)
    cache = DiffKVCache(state, ops.load("cpu", kernels), HEAD_DIM**-0.5)
    cache.open(1, PROMPT, Thresholds(1.2, 0.9))
    outputs = []
    slots = torch.tensor([1], dtype=torch.int32)
    none = torch.empty(0, dtype=torch.int32)
    for length in range(PROMPT, PROMPT + NEW):
        if length == PROMPT:
            chunk = PromptChunk(1, slice(0, PROMPT), 0, PROMPT)
            step, tokens = cache.plan([chunk], slice(0, 0), none, none), PROMPT
        else:
            lengths = torch.tensor([length + 1], dtype=torch.int32)
            step, tokens = cache.plan([], slice(0, 1), slots, lengths), 1
        for layer in range(LAYERS):
            q, k, v = (draw(tokens, heads) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
            output = torch.empty_like(q)
            cache.attend(layer, step, q, k, v, output)
            outputs.append(output.flatten())
        pool.check_invariants(state)
    kept = state.num_tokens[1].sum(-1)
    assert (kept > 16).all(), "some head dropped everything but its window"
    assert (kept < PROMPT + NEW - 1).any(), "nothing was dropped"
    assert (state.num_tokens[1, ..., 1] > 0).any(), "nothing is in the low tier"
    cache.release([1])
    pool.check_invariants(state)
    return torch.cat(outputs), state


def test_store_plan_attend_release() -> None:
    expected, _ = _run("reference")
    actual, state = _run(None)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)
    head, tail = state.ring_ends.tolist()
    assert tail - head == state.num_pages


@pytest.mark.parametrize("tier", [0, 1])
def test_bits_are_what_the_name_says(tier: int) -> None:
    layout = PageLayout.derive(QuantConfig.parse(UNKNOWN), HEAD_DIM)
    k_bits, v_bits = map(int, re.findall(r"k(\d+)v(\d+)", UNKNOWN)[tier])
    assert layout.tiers[tier].k_code_bytes == HEAD_DIM * k_bits // 8
    assert layout.tiers[tier].v_code_bytes == HEAD_DIM * v_bits // 8
