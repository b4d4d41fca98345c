"""Attention over a request's closed rows and its open one, and over rows with centres."""

import pytest
import torch
from backends import CPU, REFERENCE, Backend, gather, ints, on_cpu
from make import (
    DTYPES,
    assert_same,
    copy_of,
    make_state,
    make_sums,
    make_tiers,
    make_tokens,
    set_chain,
)
from test_attend import attended, check, used

from diffkv.state import PoolState

LAYOUTS = [
    ("k8v4-k4v2", 64, torch.bfloat16, 4),
    ("k8v4g1x2-k4v2g2x4", 80, torch.float16, 3),
    ("k16v16", 128, torch.bfloat16, 8),
    ("k16v8-k8v8", 64, torch.float32, 4),
    ("k8v16-k4v8", 96, torch.float32, 1),
    ("k4v1", 256, torch.bfloat16, 2),
    ("k8v2-k2v1g1x4", 72, torch.float32, 9),
]
"""(quant, head_dim, dtype, query heads of a KV head): with centres and without."""

LENS = [21, 5, 40, 33, 1, 0, 70, 17]
CHAINS = {0: [3], 1: [7, 3, 5, 6, 4], 2: [], 5: [6, 4]}
"""Two closed rows are in two requests each; slot 5 is an open row without tokens."""


def chained(
    backend: Backend,
    quant: str = "k8v4-k4v2",
    *args,
    lens: list[int] | None = None,
    chains: dict[int, list[int]] | None = None,
    shares: dict[str, float] | None = None,
    apart: float | None = None,
    **options,
) -> PoolState:
    """A pool with open and closed rows, on the CPU; `apart` is how far centres are, if not at random."""
    lens = LENS if lens is None else lens
    shape = {"num_slots": len(lens), "max_tokens": max(lens) + 8, "segment": 32, **options}
    state = used(make_state(quant, *args, **shape))
    if apart is not None:
        around = state.centres[:1].float()
        state.centres.copy_(around + apart * torch.randn(state.centres.shape))
    backend.fill(state, lens, **(shares or {}))
    for slot, rows in (CHAINS if chains is None else chains).items():
        set_chain(state, slot, rows)
    return state


@pytest.mark.parametrize(
    ("quant", "head_dim", "dtype", "group", "drops"),
    [*((*each, True) for each in LAYOUTS), *((*each, False) for each in LAYOUTS[::3])],
)
def test_layouts(backend, quant, head_dim, dtype, group, drops):
    """Sums grow in open rows only, in the tiers that are tracked, and closed pages stay as they are."""
    state = chained(backend, quant, head_dim, dtype, drops=drops)
    check(backend, state, [1, -1, 0, 2], group)


@pytest.mark.parametrize("slots", [[5], [5, 1], [-1, 5, -1]])
def test_open_row_without_tokens(backend, slots):
    check(backend, chained(backend), slots, 4)


def test_closed_rows_without_tokens(backend):
    check(backend, chained(backend, chains={0: [5], 2: [5, 4, 5]}), [0, 2], 2)


def test_rows_of_one_tier(backend):
    """Items of high tokens alone, or of low ones."""
    state = used(make_state("k8v4-k4v2", num_slots=4, max_tokens=64, segment=16))
    for slot, num, tier in ((0, 9, 1), (1, 30, 0), (2, 20, 1), (3, 8, 0)):
        tiers = torch.full((2, num), tier, dtype=torch.int8)
        CPU.store_prompt(state, 0, make_tokens(state, [slot], [num]), tiers, make_sums(state, num))
    set_chain(state, 0, [1, 2])
    set_chain(state, 3, [2])
    check(backend, state, [0, 3], 4)


def test_other_layers_and_what_is_past_a_chain_do_not_matter(kernels):
    state = chained(kernels, num_layers=2)
    query = torch.randn(2, 8, 64).bfloat16()
    other = copy_of(state)
    other.chains[1, 5:], other.chains[0, 1:] = 10**6, -7
    other.chains[3], other.chain_lens[3] = 10**6, 9
    results = [attended(kernels, kernels.place(each), [1, 0], query) for each in (state, other)]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [*zip(["k8v4-k4v2", "k8v8", "k1v1g4x4"], DTYPES, strict=True), ("k8v4-k4v2", DTYPES[1])],
)
def test_large_centres(backend, quant, dtype):
    """Fifty times as far apart as keys are: what rows have in common of them does no harm."""
    state = chained(backend, quant, 64, dtype, centres=50.0, apart=1.0)
    check(backend, state, [2, -1, 1, 0, 5], 4)


def test_large_centres_that_have_nothing_in_common(backend):
    check(backend, chained(backend, centres=50.0), [1, 0, 5], 4, spread=0.2)


def test_prompt_in_one_row_or_several(kernels):
    """With one centre, tokens have the same codes however they are cut, so nearly the same output."""
    state = make_state("k8v4-k4v2", 64, torch.float32, num_slots=5, max_tokens=150, segment=32)
    state.centres.copy_(state.centres[:1].clone().expand_as(state.centres))
    tokens, tiers, sums = (
        make_tokens(state, [0], [145]),
        make_tiers(state, 145),
        make_sums(state, 145),
    )
    CPU.store_prompt(state, 0, tokens, tiers, sums)
    parts = (ints(1, 2, 3, 4), ints(0, 32, 64, 96, 145))
    split = type(tokens)(*parts, tokens.key, tokens.value, tokens.positions)
    CPU.store_prompt(state, 0, split, tiers, sums)
    set_chain(state, 4, [1, 2, 3])

    output = attended(kernels, kernels.place(state), [0, 4], torch.randn(1, 8, 64).repeat(2, 1, 1))

    torch.testing.assert_close(output[0], output[1], rtol=1e-4, atol=1e-5)


def ragged(kernels: Backend) -> PoolState:
    """Rows of one and of several items of work, the same ones every time."""
    torch.manual_seed(6)
    lens = [300, 1, 700, 40, 250] if kernels.is_slow else [3000, 1, 2500, 1100, 5000]
    chains = {0: [2, 3], 1: [4, 2], 3: []}
    return chained(kernels, lens=lens, chains=chains, num_kv_heads=1, segment=512)


def test_long_rows(kernels):
    check(kernels, ragged(kernels), [0, 1], 4)


def test_a_request_alone_is_the_same_as_in_a_batch(kernels):
    """Also where it shares rows with another, down to the sums."""
    together, alone = kernels.place(ragged(kernels)), kernels.place(ragged(kernels))
    query = torch.randn(3, 4, 64).bfloat16()

    output = attended(kernels, together, [1, 0, 3], query)

    for row, slot in enumerate([1, 0, 3]):
        assert torch.equal(attended(kernels, alone, [slot], query[row : row + 1])[0], output[row])
    assert_same(on_cpu(together), on_cpu(alone))


def test_decoding_after_closed_rows(kernels):
    """Steps write only to open rows, whatever stands before them."""
    state = chained(kernels, lens=[21, 5, 40, 33], chains={0: [2, 3], 1: [3]}, window=4)
    state.thresholds[:2] = torch.tensor([3.0, 0.5])
    state.prompt_lens[:2] = ints(94, 38)
    placed = kernels.place(copy_of(state))
    expected = copy_of(state)
    for step in range(2 if kernels.is_slow else 10):
        key, value = torch.randn(2, 2, 2, 64).bfloat16()
        for ops, each in ((kernels, placed), (REFERENCE, expected)):
            plan = ops.plan_decode(each, ints(1, 0), ints(39 + step, 95 + step))
            ops.append(each, 0, plan, key, value)
        assert_same(on_cpu(placed), expected)
    check(kernels, expected, [1, 0], 4)
    before = gather(CPU, state, 0, [2, 3], [40, 33])
    assert all(map(torch.equal, gather(CPU, expected, 0, [2, 3], [40, 33]), before))
