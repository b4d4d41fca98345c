"""A device's kernels against the reference, on a pool of a few kilobytes: one request, start to end.

For a user who wants to know whether an installation works. How the kernels are proved is in the tests.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffkv import ops, pool
from diffkv.layout import PageLayout
from diffkv.ops import Ops
from diffkv.policy import DROPPED, HIGH, LOW
from diffkv.quant import DEFAULT_QUANT, QuantConfig
from diffkv.shape import PoolShape
from diffkv.state import TENSORS, NewTokens, PoolState, PromptTokens

__all__ = ["SelfTest", "run"]

HEAD_DIM, NUM_LAYERS, NUM_KV_HEADS, NUM_Q_HEADS = 64, 2, 2, 4
PROMPT_LEN, NUM_NEW, NUM_PAGES = 48, 2, 64
WINDOW = 8
SCALE = HEAD_DIM**-0.5
MAX_ERROR = 1e-4
"""Largest allowed difference of two float32 attentions over the same codes, relative to the output."""


@dataclass(frozen=True)
class SelfTest:
    """Result of a self-test.

    Attributes:
        device: device of the kernels.
        high: tokens that head 0 of layer 0 kept in high precision, before the release.
        low: likewise in low precision.
        different_pages: bytes of tables and pages that differ from the reference's after storing.
        attend_error: largest difference of the attention, relative to the reference's largest value.
        pages_held: before the release, by all heads.
        pages_leaked: not free after the release.
    """

    device: str
    high: int
    low: int
    different_pages: int
    attend_error: float
    pages_held: int
    pages_leaked: int

    @property
    def passed(self) -> bool:
        """Whether the kernels do what the reference does."""
        return (
            self.different_pages == 0 and self.attend_error <= MAX_ERROR and self.pages_leaked == 0
        )


def _empty_pool(device: str) -> PoolState:
    quant = QuantConfig.parse(DEFAULT_QUANT)
    layout = PageLayout.derive(quant, HEAD_DIM, element_bytes=4, drops=True)
    shape = PoolShape(layout, NUM_LAYERS, NUM_KV_HEADS, 1, PROMPT_LEN + NUM_NEW, NUM_PAGES)
    num_bytes = shape.table_bytes + NUM_PAGES * layout.page_bytes
    buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    state = pool.create(shape, buffer, torch.float32, WINDOW)
    state.prompt_lens[0] = PROMPT_LEN
    state.thresholds[0, 0], state.thresholds[0, 1] = 3.0, 0.5
    return state


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _store(kernels: Ops, state: PoolState, key: Tensor, tiers: Tensor, sums: Tensor) -> None:
    device = state.pages.device
    for layer in range(NUM_LAYERS):
        tokens = PromptTokens(
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.tensor([0, PROMPT_LEN], dtype=torch.int32, device=device),
            key[layer].to(device),
            key[layer].flip(0).contiguous().to(device),
            torch.arange(PROMPT_LEN, dtype=torch.int32, device=device),
        )
        kernels.store_prompt(state, layer, tokens, tiers.to(device), sums.to(device))


def _decode(kernels: Ops, state: PoolState, new: Tensor, query: Tensor) -> Tensor:
    """Outputs [NUM_NEW, NUM_LAYERS, NUM_Q_HEADS, HEAD_DIM] of some steps, on the CPU."""
    device = state.pages.device
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    outputs = torch.zeros(NUM_NEW, NUM_LAYERS, 1, NUM_Q_HEADS, HEAD_DIM)
    for step in range(NUM_NEW):
        lens = torch.tensor([PROMPT_LEN + step + 1], dtype=torch.int32, device=device)
        plan = kernels.plan_decode(state, slots, lens)
        for layer in range(NUM_LAYERS):
            x, q = new[step, layer].to(device), query[step, layer].to(device)
            output = torch.empty(1, NUM_Q_HEADS, HEAD_DIM, device=device)
            kernels.attend(state, layer, slots, q, SCALE, output, None, NewTokens(plan, x, -x))
            outputs[step, layer] = output.cpu()
    return outputs[:, :, 0]


def _different(ours: PoolState, theirs: PoolState) -> int:
    return sum(int((getattr(ours, name).cpu() != getattr(theirs, name)).sum()) for name in TENSORS)


def run(device: str = "cpu", kernels: Ops | None = None) -> SelfTest:
    """Store a prompt, generate some tokens, and release: with a device's kernels and the reference.

    Args:
        device: "cpu" or "cuda".
        kernels: to test; the device's own if None.

    Raises:
        ConfigError: the device has no kernels, or they cannot be compiled.
    """
    if kernels is None:
        kernels = ops.load(device)
    generator = torch.Generator().manual_seed(0)
    key = _random(generator, NUM_LAYERS, PROMPT_LEN, NUM_KV_HEADS, HEAD_DIM)
    new = _random(generator, NUM_NEW, NUM_LAYERS, 1, NUM_KV_HEADS, HEAD_DIM)
    query = _random(generator, NUM_NEW, NUM_LAYERS, 1, NUM_Q_HEADS, HEAD_DIM)
    tiers = torch.tensor([HIGH, LOW, LOW, DROPPED], dtype=torch.int8)
    tiers = tiers.repeat(NUM_KV_HEADS, PROMPT_LEN // len(tiers))
    tiers[:, -WINDOW:] = HIGH
    sums = torch.rand(NUM_KV_HEADS, PROMPT_LEN, generator=generator)

    state, expected_state = _empty_pool(device), _empty_pool("cpu")
    expected_ops = ops.load("cpu", "reference")
    _store(kernels, state, key, tiers, sums)
    _store(expected_ops, expected_state, key, tiers, sums)
    different = _different(state, expected_state)
    expected = _decode(expected_ops, expected_state, new, query)
    error = (_decode(kernels, state, new, query) - expected).abs().max() / expected.abs().max()
    high, low = state.num_tokens[0, 0, 0].tolist()
    held = int(state.num_pages_held.sum())
    kernels.release(state, torch.zeros(1, dtype=torch.int32, device=state.pages.device), -1)
    head, tail = state.ring_ends.tolist()
    return SelfTest(device, high, low, different, float(error), held, NUM_PAGES - (tail - head))
