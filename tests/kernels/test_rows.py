"""Complete rows: their tiers, the room in their last high pages, and their centres."""

import dataclasses

import pytest
import torch
from backends import ints
from make import DTYPES, make_state

from diffkv import reference
from diffkv.policy import DROPPED, HIGH, LOW, SCORED_QUERIES

WINDOW = 8


def starts_of(lens):
    return torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32)


def decided(ops, sums, lens, bounds, page_tokens, scored=SCORED_QUERIES, tiers=None, window=WINDOW):
    """Sums and tiers after a decision."""
    sums = sums.clone()
    tiers = torch.full(sums.shape, 7, dtype=torch.int8) if tiers is None else tiers.clone()
    if bounds is not None:
        bounds = torch.tensor(bounds)
    ops.decide_rows(sums, starts_of(lens), bounds, ints(*page_tokens), window, scored, tiers)
    return sums, tiers


def check(kernels, *case, **options):
    got = decided(kernels, *case, **options)
    wanted = decided(reference, *case, **options)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    return wanted[1]


@pytest.mark.parametrize(
    ("page_tokens", "scored"), [(0, 64), (1, 5), (7, 64), (32, 1 << 30), (32, 5)]
)
@pytest.mark.parametrize("lens", [[1], [8, 9, 0, 65], [200, 3, 1024], [2047], [2048, 1], [2049]])
def test_tiers_and_sums_are_the_references(kernels, lens, page_tokens, scored):
    """Few values, so that many are equal, and a mean that is no number."""
    sums = (torch.rand(3, sum(lens)) * 12).round() / 10
    sums[1, 0] = torch.nan
    bounds = [[0.006 + 0.002 * r, 0.002] for r in range(len(lens))]
    each = [page_tokens * (r % 3 != 1) for r in range(len(lens))]
    check(kernels, sums, lens, bounds, each, scored)


@pytest.mark.parametrize("length", [5, 4095, 4096, 4500])
def test_rows_longer_than_a_block(kernels, length):
    """Distinct means all over the range of float32, and equal ones in several blocks."""
    sums = torch.exp(-40 * torch.rand(2, length)).float()
    sums[1, ::9] = 0.03125
    sums[1, -60:] = 0.0
    tiers = check(kernels, sums, [length], [[0.5, 0.0]], [37])
    assert length < 37 or not ((tiers == HIGH).sum(1) % 37).any()
    same = torch.full_like(sums, 0.5)
    tiers = check(kernels, same, [length], [[1.0, 0.0]], [100])
    # The last 63 were seen by fewer queries, so that their means are larger; then the first ones
    expected = [HIGH] * 37 + [LOW] * (length - 100) + [HIGH] * 63
    assert tiers.tolist() == [expected if length > 100 else [HIGH] * length] * 2


def test_by_hand(backend):
    sums = torch.tensor([[9, 0.2, 0.3, 7, 0.3, 9], [1, 2, 9, 9, 9, 9], [7, 7, 7, 7, 9, 0.0]])
    tiers = torch.tensor([[0, 1, 1, 2, 1, 0], [1, 1, 0, 0, 0, 0], [2, 2, 2, 2, 0, 1]]).to(
        torch.int8
    )
    sums *= torch.arange(6, 0, -1)
    _, got = decided(backend, sums, [6], None, [4], tiers=tiers)
    assert got.tolist() == [[0, 1, 0, 2, 0, 0], [1, 1, 0, 0, 0, 0], [2, 2, 2, 2, 0, 0]]


def test_of_equal_means_the_earlier_moves(backend):
    tiers = torch.tensor([[1, 1, 1, 1, 0, 0]], dtype=torch.int8)
    sums = torch.tensor([[0.2, 0.5, 0.5, 0.5, 1, 1]]) * torch.arange(6, 0, -1)
    _, got = decided(backend, sums, [6], None, [4], tiers=tiers)
    assert got.tolist() == [[1, 0, 0, 1, 0, 0]]
    unknown = torch.tensor([[torch.nan, torch.nan, 0.0, 0.0, 1, 1]])
    _, got = decided(backend, unknown, [6], None, [6], tiers=tiers)
    assert got.tolist() == [[1, 1, 0, 0, 0, 0]]


def test_rows_are_decided_by_themselves(backend):
    lens, bounds, page_tokens = (
        [30, 12, 77],
        [[0.01, 0.004], [0.02, 0.0], [0.005, 0.005]],
        [4, 9, 0],
    )
    sums = torch.rand(2, sum(lens))
    together = decided(backend, sums, lens, bounds, page_tokens, 16)
    each = zip(sums.split(lens, 1), lens, bounds, page_tokens, strict=True)
    alone = [decided(backend, s, [n], [b], [p], 16) for s, n, b, p in each]
    for i in range(2):
        assert torch.equal(together[i], torch.cat([one[i] for one in alone], 1))
    assert {HIGH, LOW, DROPPED} == set(together[1].flatten().tolist())


def test_wrong_decisions_are_refused(kernels):
    sums, tiers = torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int8)
    with pytest.raises(ValueError, match="bounds"):
        kernels.decide_rows(sums, ints(0, 5), torch.zeros(2), ints(0), 8, 64, tiers)
    with pytest.raises(ValueError, match="cu_seqlens"):
        kernels.decide_rows(sums, ints(0, 5, 5), None, ints(0), 8, 64, tiers)
    with pytest.raises(ValueError, match="tiers"):
        kernels.decide_rows(sums, ints(0, 5), None, ints(0), 8, 64, tiers.int())


ROWS = ([4, 1, -1, -1], [0, 0, -1, 2], [5, 0, 3, 6], [1, 1, -1, -1], [7, 0, 3, -1])
"""Slot, skipped, before, heir."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_centres_are_means(kernels, head_dim, dtype):
    lens = [300, 1, 40, 1, 0]
    state = make_state("k8v4", head_dim, dtype, num_layers=2, num_slots=9)
    key = (3 + torch.randn(sum(lens), 2, head_dim)).to(dtype)
    expected = dataclasses.replace(state, centres=state.centres.clone())
    reference.centre_rows(expected, 1, torch.tensor(ROWS, dtype=torch.int32), starts_of(lens), key)
    before, placed = state.centres.clone(), kernels.place(state)
    kernels.centre_rows(placed, 1, torch.tensor(ROWS, dtype=torch.int32), starts_of(lens), key)
    got = placed.centres.cpu()

    # bfloat16 has 8 bits: sums in another order may fall on the other side of a middle
    torch.testing.assert_close(got.float(), expected.centres.float(), rtol=2**-7, atol=1e-6)
    if kernels.name == "cpu":
        assert torch.equal(got, expected.centres)
    mean = key[1:300].float().mean(0)
    torch.testing.assert_close(got[4, 1].float(), mean, rtol=2**-8, atol=1e-6)
    assert torch.equal(got[0, 1], key[300].bfloat16()) and torch.equal(got[2, 1], got[0, 1])
    assert torch.equal(got[[5, 6, 7], 1], before[[3, 3, 3], 1])
    assert not got[1, 1].any(), "no token counts"
    assert torch.equal(got[:, 0], before[:, 0]) and torch.equal(got[[3, 8]], before[[3, 8]])


def test_a_centre_does_not_know_what_else_there_is(kernels):
    lens = [700, 90, 513]
    state = kernels.place(make_state("k8v4", num_slots=6))
    key = torch.randn(sum(lens), 2, 64).bfloat16()
    rows = ints(0, 1, -1, -1, 1, 0, -1, -1, 2, 0, -1, -1).view(3, 4)
    kernels.centre_rows(state, 0, rows, starts_of(lens), key)
    for r, part in enumerate(key.split(lens)):
        alone = rows[r : r + 1].clone()
        alone[0, 0] = 3 + r
        kernels.centre_rows(state, 0, alone, starts_of([lens[r]]), part.contiguous())
    assert torch.equal(state.centres[:3], state.centres[3:])


def test_keys_of_centres_may_be_apart(backend):
    state = backend.place(make_state("k8v4", num_slots=2))
    packed = torch.randn(50, 4, 64).bfloat16()
    one, other = ints(0, 1, -1, -1).view(1, 4), ints(1, 1, -1, -1).view(1, 4)
    backend.centre_rows(state, 0, one, ints(0, 50), packed[:, 1:3])
    backend.centre_rows(state, 0, other, ints(0, 50), packed[:, 1:3].contiguous())
    assert torch.equal(state.centres[0], state.centres[1])


def test_a_pool_without_centres_has_none_to_note(kernels):
    state = kernels.place(make_state("k16v16"))
    with pytest.raises(ValueError, match="state must have centres"):
        kernels.centre_rows(
            state, 0, ints(0, 0, -1, -1).view(1, 4), ints(0, 1), torch.zeros(1, 2, 64).bfloat16()
        )
