"""Steps over rotated pages: the same as rotating by hand, up to rounding."""

import pytest
import torch
from backends import REFERENCE, gather, ints, on_cpu
from contents import read_head
from make import copy_of, make_state, set_chain

from diffkv import reference
from diffkv.rotation import signs
from diffkv.state import NewTokens

LAYOUTS = [
    ("k8v4-k4v2", 128, torch.bfloat16, 4),
    ("k8v8-k4v2", 64, torch.float32, 2),
    ("k8v4g1x2-k4v2g2x4", 80, torch.float16, 3),
    ("k4v1", 96, torch.float32, 1),
    ("k16v16-k16v8", 256, torch.bfloat16, 2),
]
"""(quant, head_dim, dtype, query heads of a KV head)."""

LENS = [37, 5]


def turned(x, back=False):
    """Vectors rotated by the reference, or back."""
    out = torch.empty_like(x)
    reference.rotate(x, signs(x.shape[-1]), back, out)
    return out


def apart(*shape, dtype):
    """Random vectors as slices of wider rows, as those of one product are."""
    wide = torch.randn(shape[0], shape[1] + 3, shape[2]).to(dtype)
    return wide[:, 2 : 2 + shape[1]]


def filled(kernels, quant, head_dim, dtype):
    """A pool with two requests."""
    state = make_state(quant, head_dim=head_dim, dtype=dtype, max_tokens=64)
    kernels.fill(state, LENS)
    return state


def tokens_of(state):
    """Keys, values and tiers of both requests, after a token more."""
    return gather(REFERENCE, on_cpu(state), 0, [0, 1], [n + 1 for n in LENS])


@pytest.mark.parametrize(("quant", "head_dim", "dtype", "group"), LAYOUTS)
def test_new_tokens_are_rotated(kernels, quant, head_dim, dtype, group):
    state = filled(kernels, quant, head_dim, dtype)
    key, value = (apart(3, state.num_kv_heads, head_dim, dtype=dtype) for _ in range(2))
    slots, lens = ints(1, -1, 0), ints(LENS[1] + 1, 1, LENS[0] + 1)
    states = [kernels.place(copy_of(state)) for _ in range(2)]
    plans = [kernels.plan_decode(each, slots, lens) for each in states]
    kernels.append(states[0], 0, plans[0], key, value, signs(head_dim))
    kernels.append(states[1], 0, plans[1], turned(key), turned(value))
    for got, wanted in zip(tokens_of(states[0]), tokens_of(states[1]), strict=True):
        got, wanted = got.float(), wanted.float()
        differ = (got != wanted).float().mean()
        # An element on the edge between two codes may get the other one, where a sum's rounding differs
        step = (wanted.amax(-1, keepdim=True) - wanted.amin(-1, keepdim=True)).clamp(min=1e-6)
        assert differ < 0.01 and ((got - wanted).abs() <= 1.01 * step).all()
        assert not torch.equal(wanted, torch.zeros_like(wanted))
    assert not torch.equal(turned(key), key)


@pytest.mark.parametrize(("quant", "head_dim", "dtype", "group"), LAYOUTS)
def test_queries_are_rotated_and_outputs_back(kernels, quant, head_dim, dtype, group):
    state = filled(kernels, quant, head_dim, dtype)
    query = apart(3, state.num_kv_heads * group, head_dim, dtype=dtype)
    slots, scale = ints(1, -1, 0), head_dim**-0.5
    states = [kernels.place(copy_of(state)) for _ in range(2)]
    outputs = [torch.empty(query.shape, dtype=dtype) for _ in range(2)]
    kernels.attend(states[0], 0, slots, query, scale, outputs[0], signs(head_dim))
    kernels.attend(states[1], 0, slots, turned(query), scale, outputs[1])
    wanted = turned(outputs[1], back=True)
    assert not wanted[1].any() and not outputs[0][1].any(), "a row that is no request is not 0"
    eps = torch.finfo(dtype).eps
    # Codes are multiplied as 1024 and more, so a query's rounding weighs as much; a GPU multiplies
    # numbers of float32 in parts
    of_float32 = 128 if kernels.device == "cpu" else 4096
    times = of_float32 if dtype is torch.float32 else 8
    atol = times * eps * float(wanted.abs().max())
    torch.testing.assert_close(outputs[0], wanted, rtol=0, atol=atol)
    sums = [sums_of(on_cpu(each)) for each in states]
    torch.testing.assert_close(*sums, rtol=times * eps, atol=times * eps)


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(("quant", "head_dim", "dtype", "group"), LAYOUTS)
def test_attention_that_writes_new_tokens_first_is_append_and_attention(
    kernels, quant, head_dim, dtype, group, rotates
):
    """To the bit, in both layers. Nothing is launched in between: all tensors are there before."""
    lens, shape = [*LENS, 21], {"num_layers": 2, "num_slots": 4, "max_tokens": 96, "segment": 32}
    state = make_state(quant, head_dim=head_dim, dtype=dtype, **shape)
    kernels.fill(state, lens)
    set_chain(state, 0, [2])
    state.thresholds[:2], state.prompt_lens[:2] = torch.tensor([1e6, 0.0]), ints(58, 5)
    heads, slots, seq_lens = state.num_kv_heads, ints(1, -1, 0), ints(6, 1, 59)
    query = apart(3, heads * group, head_dim, dtype=dtype)
    vectors = [apart(3, heads, head_dim, dtype=dtype) for _ in range(2)]
    chosen, ops = signs(head_dim) if rotates else None, kernels.module
    results = []
    for is_apart in (True, False):
        placed = kernels.place(copy_of(state))
        q, k, v, turn, rows = map(kernels.place, (query, *vectors, chosen, slots))
        outs = [torch.empty(query.shape, dtype=dtype, device=kernels.device) for _ in range(2)]
        plan = ops.plan_decode(placed, rows, kernels.place(seq_lens))
        for layer, (out, key, value) in enumerate(zip(outs, (k, v), (v, k), strict=True)):
            if is_apart:
                ops.append(placed, layer, plan, key, value, turn)
            new = None if is_apart else NewTokens(plan, key, value)
            ops.attend(placed, layer, rows, q, head_dim**-0.5, out, turn, new)
        results.append([*map(on_cpu, outs), on_cpu(placed).pages])
    assert all(map(torch.equal, *results))
    assert all(out[0].any() and out[2].any() and not out[1].any() for out in results[0][:2])
    assert ((on_cpu(plan).places[2, ..., 2] >= 0) == (state.layout.low is not None)).all()


def sums_of(state):
    """Significance sums of all tokens of layer 0."""
    heads = [
        read_head(state, slot, 0, head).sums
        for slot in range(len(LENS))
        for head in range(state.num_kv_heads)
    ]
    return torch.cat(heads)


def test_signs_of_another_size_are_refused(kernels):
    state = filled(kernels, "k8v4-k4v2", 64, torch.float32)
    query = torch.randn(1, 2 * state.num_kv_heads, 64)
    with pytest.raises(ValueError, match="signs must be"):
        kernels.attend(state, 0, ints(0), query, 1.0, torch.empty_like(query), signs(32))
