"""Attention over both tiers: near a float32 reference, and the same bits however it is batched."""

import itertools

import pytest
import torch
from make import (
    DTYPES,
    FORMATS,
    assert_same,
    copy_of,
    fill,
    make_state,
    make_sums,
    make_tiers,
    make_tokens,
)
from torch import Tensor

from diffkv import reference
from diffkv.kernels import cpu
from diffkv.layout import PageLayout
from diffkv.quant import ConfigError, QuantConfig
from diffkv.state import PoolState


def tensors_of(state: PoolState, slot: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a slot keeps in layer 0, read back in float32: key, value [H, n, D], kept [H, n]."""
    most = max(1, int(state.num_tokens[slot, 0].sum(-1).max()))
    key, value, positions, _ = cpu.gather(state, 0, slot, most)
    return key, value, positions >= 0


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, scale: float
) -> Tensor:
    """Plain torch in the dtype of its arguments: query [Hq, D] to [Hq, D]."""
    group = query.shape[0] // key.shape[0]
    q = query.view(key.shape[0], group, -1)
    scores = (q @ key.transpose(1, 2)) * scale
    probs = scores.masked_fill(~kept[:, None], float("-inf")).softmax(-1)
    return (probs @ value).reshape(query.shape)


def sums_of(state: PoolState) -> Tensor:
    """The bytes of the sums of all pages, one tensor for every tier."""
    parts = []
    for tier in state.layout.tiers:
        end = tier.sums + tier.tokens_per_page * 4
        parts.append(state.pages[:, tier.sums : end].contiguous().view(torch.float32).flatten())
    return torch.cat(parts)


def run(state: PoolState, slots: list[int], query: Tensor) -> Tensor:
    output = torch.empty_like(query)
    ids = torch.tensor(slots, dtype=torch.int32)
    cpu.attend(state, 0, ids, query, query.shape[-1] ** -0.5, output)
    return output


def check(state: PoolState, slots: list[int], group: int) -> None:
    """The FlashAttention rule against float64, and sums against the reference."""
    head_dim, num_heads = state.layout.head_dim, state.num_kv_heads * group
    query = torch.randn(len(slots), num_heads, head_dim).to(state.dtype)
    expected, before = copy_of(state), copy_of(state)
    scale = head_dim**-0.5

    output = run(state, slots, query)

    ids = torch.tensor(slots, dtype=torch.int32)
    reference.attend(expected, 0, ids, query, scale, torch.zeros_like(query))
    after = sums_of(state)
    finite = sums_of(before).isfinite() & after.isfinite()
    grown = sums_of(expected) != sums_of(before)
    assert finite[grown].all()
    torch.testing.assert_close(after[grown], sums_of(expected)[grown], rtol=1e-5, atol=1e-5)
    # Nothing but the sums of kept tokens has changed
    changed = (state.pages != before.pages) & ~sum_bytes(state)
    assert not changed.any()

    for r, slot in enumerate(slots):
        if slot < 0 or not state.num_tokens[slot, 0].any():
            assert not output[r].any()
            continue
        key, value, kept = tensors_of(before, slot)
        wide = plain_attention(query[r].double(), *exact(before, slot), scale)
        plain = plain_attention(query[r], key, value, kept, scale)
        ours, theirs = (output[r] - wide).abs().max(), (plain - wide).abs().max()
        # Of the output in its dtype, and of summands in float32: a quantised value is added as a zero
        # and a multiple of a scale, which may be twice as large
        rounding = max(
            wide.abs().max() * torch.finfo(state.dtype).eps,
            2 * value.abs().max() * torch.finfo(torch.float32).eps,
        )
        assert ours <= 2 * theirs + rounding, f"{ours} against {theirs} of plain torch"


def exact(state: PoolState, slot: int) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value as the codes say, in float64: the cache's vectors before any rounding."""
    from diffkv.reference.decode import _tokens
    from diffkv.reference.pages import read_token

    heads = []
    for head in range(state.num_kv_heads):
        row = (slot, 0, head)
        tokens = [
            read_token(state, tier, place, torch.float32)
            for tier in range(len(state.layout.tiers))
            for place in _tokens(state, row, tier)
        ]
        heads.append([torch.stack([t[i] for t in tokens]) for i in range(2)] if tokens else None)
    most = max(len(h[0]) for h in heads if h)
    key, value = torch.zeros(2, len(heads), most, state.layout.head_dim, dtype=torch.float64)
    kept = torch.zeros(len(heads), most, dtype=torch.bool)
    for i, head in enumerate(heads):
        if head:
            key[i, : len(head[0])], value[i, : len(head[0])] = head
            kept[i, : len(head[0])] = True
    return key, value, kept


def sum_bytes(state: PoolState) -> Tensor:
    """Which bytes of a page may be sums, in one tier or the other."""
    mask = torch.zeros(state.layout.page_bytes, dtype=torch.bool)
    for tier in state.layout.tiers:
        mask[tier.sums : tier.sums + tier.tokens_per_page * 4] = True
    return mask


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 9, 16])
def test_groups(group):
    state = make_state("k8v4-k4v2")
    fill(cpu, state, [50, 21])
    check(state, [1, 0], group)


@pytest.mark.parametrize("head_dim", [8, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("quant", ["k8v4-k4v2", "k8v2g1x4-k2v1g4x2"])
def test_head_dims(quant, head_dim):
    state = make_state(quant, head_dim)
    fill(cpu, state, [45])
    check(state, [0, -1], 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", ["k16v16", "k16v4-k4v1", "k8v8"])
def test_dtypes(quant, dtype):
    state = make_state(quant, 80, dtype)
    fill(cpu, state, [61, 3, 17])
    check(state, [2, 0, 1], 3)


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("high", [0.0, 1.0])
def test_page_boundary(extra, high):
    state = make_state("k8v4-k4v2")
    num = state.layout.tiers[0 if high else 1].tokens_per_page + extra
    fill(cpu, state, [num], high=high, dropped=0.0)
    check(state, [0], 2)


def test_one_token_and_none():
    state = make_state("k8v4-k4v2")
    fill(cpu, state, [1], high=1.0, dropped=0.0)
    check(state, [0, 1, -1], 4)


def test_large_scores():
    state = make_state("k8v4-k4v2", dtype=torch.float32)
    fill(cpu, state, [60])
    query = torch.randn(1, 8, 64) * 300
    expected, output = copy_of(state), torch.zeros(1, 8, 64)
    reference.attend(expected, 0, torch.zeros(1, dtype=torch.int32), query, 0.125, output)

    torch.testing.assert_close(run(state, [0], query), output, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sums_of(state), sums_of(expected), rtol=0, atol=2e-3, equal_nan=True)


def long_ragged_state() -> PoolState:
    torch.manual_seed(5)
    state = make_state("k8v4-k4v2", num_kv_heads=3, max_tokens=5000, num_slots=4)
    fill(cpu, state, [4999, 1, 700, 2000])
    return state


def test_long_ragged():
    state = long_ragged_state()
    query = torch.randn(4, 12, 64).to(state.dtype)
    before = copy_of(state)

    output = run(state, [0, 1, 2, 3], query)

    for slot in range(4):
        key, value, kept = tensors_of(before, slot)
        wide = plain_attention(query[slot].float(), key.float(), value.float(), kept, 0.125)
        wide = wide.nan_to_num(0.0)  # heads that keep no token
        assert (output[slot] - wide).abs().max() <= 0.01
    # Each of a token's probabilities is counted once, for the largest of its group
    grown = (sums_of(state) - sums_of(before)).nan_to_num(0).double().sum()
    num_heads = int((state.num_tokens[:, 0].sum(-1) > 0).sum())
    assert num_heads <= grown <= num_heads * 4


def test_a_request_alone_is_the_same_as_in_a_batch():
    query = torch.randn(4, 12, 64).bfloat16()
    together, alone = long_ragged_state(), long_ragged_state()

    output = run(together, [2, 0, 3, 1], query)

    for row, slot in enumerate([2, 0, 3, 1]):
        assert torch.equal(run(alone, [slot], query[row : row + 1])[0], output[row])
    assert_same(alone, together)


def test_threads_do_not_change_a_bit():
    query = torch.randn(4, 12, 64).bfloat16()
    outputs, states = [], []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        states.append(long_ragged_state())
        outputs.append(run(states[-1], [0, 1, 2, 3], query))
    for output, state in zip(outputs[1:], states[1:], strict=True):
        assert torch.equal(output, outputs[0])
        assert_same(state, states[0])


def test_rows_of_query_and_output_may_be_apart():
    state = make_state("k8v4-k4v2")
    fill(cpu, state, [50, 21])
    wide = torch.randn(2, 24, 64).bfloat16()
    query, output = wide[:, 8:16], torch.zeros(2, 24, 64).bfloat16()
    other = copy_of(state)
    slots = torch.tensor([0, 1], dtype=torch.int32)

    cpu.attend(state, 0, slots, query, 0.125, output[:, :8])

    assert torch.equal(output[:, :8], run(other, [0, 1], query.contiguous()))
    assert not output[:, 8:].any()


def pairs() -> list[str]:
    """Every high-low pair of the original's formats that is a configuration, and single ones."""
    found = list(FORMATS)
    for high, low in itertools.product(FORMATS, FORMATS):
        try:
            quant = QuantConfig.parse(f"{high}-{low}")
            PageLayout.derive(quant, 64)
        except ConfigError:
            continue
        found.append(str(quant))
    return found


@pytest.mark.parametrize("quant", pairs())
def test_every_pair_from_store_to_release(quant):
    state = make_state(quant, 64, window=4, max_tokens=96, num_slots=1)
    tokens = make_tokens(state, [0], [48])
    tiers, sums = make_tiers(state, 48), make_sums(state, 48)
    expected = copy_of(state)
    slots, seq_lens = torch.zeros(1, dtype=torch.int32), torch.tensor([49], dtype=torch.int32)
    key, value = torch.randn(2, 1, 2, 64).bfloat16()
    query = torch.randn(1, 4, 64).bfloat16()
    outputs = []
    for ops, each in ((cpu, state), (reference, expected)):
        each.thresholds[0], each.prompt_lens[0] = torch.tensor([40.0, 2.0]), 48
        ops.store_prompt(each, 0, tokens, tiers, sums)
        plan = ops.plan_decode(each, slots, seq_lens)
        ops.append(each, 0, plan, key, value)
        outputs.append(torch.zeros_like(query))
        ops.attend(each, 0, slots, query, 0.125, outputs[-1])

    torch.testing.assert_close(*(x.float() for x in outputs), rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(sums_of(state), sums_of(expected), equal_nan=True)
    assert not ((state.pages != expected.pages) & ~sum_bytes(state)).any()
    for ops, each in ((cpu, state), (reference, expected)):
        ops.release(each, slots, -1)
    assert torch.equal(state.free_ring, expected.free_ring)
    assert torch.equal(state.ring_ends, expected.ring_ends)
    assert not state.num_tokens.any()


def test_wrong_tensors_are_refused():
    state = make_state("k8v4")
    slots, query = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 4, 64).bfloat16()
    with pytest.raises(ValueError, match=r"query must .* 3"):
        cpu.attend(state, 0, slots, query[:, :3], 1.0, query)
    with pytest.raises(ValueError, match="output"):
        cpu.attend(state, 0, slots, query, 1.0, query.float())
    with pytest.raises(ValueError, match="slots"):
        cpu.attend(state, 0, slots.repeat(2), query, 1.0, query)
