"""Attention over both tiers: near float64, sums too, and the same bits however it is batched."""

import pytest
import torch
from backends import CPU, Backend, ints, on_cpu
from contents import pages_of, read_request, sum_bytes
from make import DTYPES, FORMATS, assert_same, copy_of, make_state
from torch import Tensor

from diffkv.kernels import cpu
from diffkv.state import NewTokens, PoolState

LAYOUTS = [
    *((quant, 64, torch.float32, 4) for quant in FORMATS),
    ("k8v4-k4v2", 64, torch.bfloat16, 4),
    ("k8v4g1x2-k4v2g2x4", 80, torch.float16, 3),
    ("k16v16", 128, torch.bfloat16, 8),
    ("k16v16", 96, torch.float32, 1),
    ("k16v16", 64, torch.float16, 2),
    ("k8v2-k2v1g1x4", 64, torch.float32, 16),
    ("k8v8g2x4-k4v4g4x4", 96, torch.float32, 2),
    ("k4v1", 256, torch.bfloat16, 2),
    ("k1v1g4x4", 128, torch.float32, 5),
    ("k16v8-k8v8", 64, torch.float32, 4),
    ("k16v16-k16v8", 64, torch.bfloat16, 4),
]
"""(quant, head_dim, dtype, query heads of a KV head)."""

GPU_ROUNDINGS, GPU_SUM_ERROR = 256, 1e-3
"""Of products of float32, which a GPU computes in three parts of fewer bits."""


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, more: Tensor):
    """Plain torch in the dtype of its arguments, of one head: output [G, D], probabilities [G, n].

    To scores [G, n], float64 `more` is added before they are compared.
    """
    scores = ((query @ key.T) * scale).double() + more
    probs = scores.softmax(-1).to(value.dtype)
    return probs @ value, probs


def used(state: PoolState) -> PoolState:
    """The state, with pages that others have used before."""
    state.pages.copy_(torch.randint(0, 256, state.pages.shape, dtype=torch.uint8))
    return state


def filled(backend: Backend, quant: str, lens: list[int], *args, shares=None, **options):
    """A pool with random requests, on the CPU."""
    state = used(make_state(quant, *args, max_tokens=max(lens) + 8, **options))
    backend.fill(state, lens, **(shares or {}))
    return state


def attended(backend: Backend, state: PoolState, slots: list[int], query: Tensor) -> Tensor:
    """Output of layer 0; the sums of a state on the backend's device change."""
    output = torch.empty_like(query)
    backend.attend(state, 0, ints(*slots), query, query.shape[-1] ** -0.5, output)
    return output


def check_head(backend: Backend, before: PoolState, after: PoolState, row, query, output) -> None:
    """One KV head by the FlashAttention rule; row is (slot, layer, head), query and output [G, D]."""
    dtype, scale = query.dtype, query.shape[-1] ** -0.5
    old, is_open = read_request(before, *row)
    new, _ = read_request(after, *row)
    if not len(old.key):
        assert not output.any(), "a head without tokens has no output"
        return
    # What all centres have in common changes nothing, and excuses no more than rounding in float32
    common = (query.double() @ old.centre[-1]) * scale
    apart = (query.double() @ old.centre.T) * scale - common[:, None]
    inexact = float(apart.abs().max()) + (backend.name != "cpu") * float(common.abs().max())
    wide, probs = plain_attention(query.double(), old.key, old.value, scale, apart)
    plain, plain_probs = plain_attention(
        query, old.key.to(dtype), old.value.to(dtype), scale, apart
    )
    ours, theirs = (output - wide).abs().max(), (plain - wide).abs().max()
    # Of the output in its dtype, and of summands in float32: a quantised value is added as a zero
    # and a multiple of a scale, which may be twice as large; in Triton, of 1024 plus a code of at most
    # 255, in values and in keys
    times = 4 if backend.name != "triton" else 40 if backend.device == "cpu" else GPU_ROUNDINGS
    float32 = torch.finfo(torch.float32).eps
    summands = (times + inexact) * old.value.abs().max()
    rounding = max(wide.abs().max() * torch.finfo(dtype).eps, summands * float32)
    assert ours <= 2 * theirs + rounding, f"{ours} against {theirs} of plain torch"

    tracked = torch.tensor([tier.tracked for tier in before.layout.tiers])[old.tiers]
    grown = torch.where(tracked & is_open, probs.amax(0), 0.0)
    allowed = 1e-5 if backend.device == "cpu" else GPU_SUM_ERROR
    allowed += inexact * float32
    if (
        backend.name == "triton" and dtype is not torch.float32
    ):  # queries and probabilities in float16
        allowed += 2 * float((plain_probs - probs).abs().max())
    torch.testing.assert_close(
        new.sums.double(), old.sums.double() + grown, rtol=1e-5, atol=allowed
    )


def check(backend: Backend, state: PoolState, slots: list[int], group: int, spread=1.0) -> None:
    """Output and sums of every head, and that nothing else has changed."""
    head_dim, heads = state.layout.head_dim, state.num_kv_heads
    query = spread * torch.randn(len(slots), heads * group, head_dim)
    query = query.to(state.dtype)
    placed = backend.place(copy_of(state))
    output = attended(backend, placed, slots, query)
    after = on_cpu(placed)
    for slot, q, out in zip(slots, query, output, strict=True):
        if slot < 0:
            assert not out.any(), "a row that is no request is not 0"
            continue
        for head in range(heads):
            of_head = slice(head * group, (head + 1) * group)
            check_head(backend, state, after, (slot, 0, head), q[of_head], out[of_head])
    changed = after.pages != state.pages
    assert not (changed.any(0) & ~sum_bytes(state)).any(), "bytes beside the sums have changed"
    closed = ~pages_of(state, [slot for slot in slots if slot >= 0])
    assert not changed[closed].any(), "pages that no open row holds have changed"
    after.pages.copy_(state.pages)
    assert_same(after, state)


@pytest.mark.parametrize(("quant", "head_dim", "dtype", "group"), LAYOUTS)
def test_layouts(kernels, quant, head_dim, dtype, group):
    check(kernels, filled(kernels, quant, [37, 17, 70], head_dim, dtype), [2, -1, 0, 1], group)


@pytest.mark.parametrize(("quant", "head_dim", "dtype", "group"), LAYOUTS[1::7])
def test_layouts_without_sums(kernels, quant, head_dim, dtype, group):
    state = filled(kernels, quant, [37, 17, 70], head_dim, dtype, drops=False)
    check(kernels, state, [2, -1, 0, 1], group)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 9, 16])
def test_groups(kernels, group):
    check(kernels, filled(kernels, "k8v4-k4v2", [50, 21]), [1, 0], group)


@pytest.mark.parametrize(
    ("quant", "head_dim"),
    zip(["k8v4-k4v2", "k8v2g1x4-k2v1g4x2"] * 3, [80, 8, 96, 72, 128, 256], strict=True),
)
def test_head_dims(kernels, quant, head_dim):
    check(kernels, filled(kernels, quant, [45], head_dim), [0, -1], 4)


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [
        *(("k16v16", dtype) for dtype in DTYPES),
        *zip(["k8v8", "k16v4-k4v1"], DTYPES[1:], strict=True),
    ],
)
def test_dtypes(backend, quant, dtype):
    check(backend, filled(backend, quant, [61, 3, 17], 80, dtype), [2, 0, 1], 3)


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("high", [0.0, 1.0])
def test_page_boundary(backend, extra, high):
    num = make_state("k8v4-k4v2").layout.tiers[0 if high else 1].tokens_per_page + extra
    shares = {"high": high, "dropped": 0.0}
    check(backend, filled(backend, "k8v4-k4v2", [num], shares=shares), [0], 2)


@pytest.mark.parametrize("num", [1, 15, 16, 17, 63, 64, 65, 128, 129])
def test_tile_boundary(kernels, num):
    """Tiles of 64 tokens, and pages of 16."""
    state = filled(
        kernels, "k16v16", [num], 64, torch.float16, num_slots=1, shares={"dropped": 0.0}
    )
    check(kernels, state, [0], 2)


@pytest.mark.parametrize("page_bytes", [1024, 6784])
def test_any_number_of_tokens_per_page(kernels, page_bytes):
    state = filled(kernels, "k8v4-k4v2", [75, 9], 128, page_bytes=page_bytes)
    check(kernels, state, [0, 1], 4)


def test_one_token_and_none(backend):
    shares = {"high": 1.0, "dropped": 0.0}
    check(backend, filled(backend, "k8v4-k4v2", [1, 0], shares=shares), [0, 1, -1, 2], 4)


def test_large_scores(backend):
    """Where almost all of the probability is on one token."""
    state = filled(backend, "k8v4-k4v2", [60], 64, torch.float32)
    check(backend, state, [0], 4, spread=30.0)


def ragged(kernels: Backend) -> PoolState:
    """Some requests short and one long, the same ones every time."""
    torch.manual_seed(5)
    lens = [900, 1, 250, 400] if kernels.is_slow else [4999, 1, 700, 2000]
    heads = 1 if kernels.is_slow else 3
    return filled(kernels, "k8v4-k4v2", lens, num_kv_heads=heads, num_slots=4)


def test_long_ragged(kernels):
    check(kernels, ragged(kernels), [0, 1, 2, 3], 4)


def test_a_request_alone_is_the_same_as_in_a_batch(kernels):
    together, alone = kernels.place(ragged(kernels)), kernels.place(ragged(kernels))
    query = torch.randn(4, 4 * together.num_kv_heads, 64).bfloat16()

    output = attended(kernels, together, [2, 0, 3, 1], query)

    for row, slot in enumerate([2, 0, 3, 1]):
        assert torch.equal(attended(kernels, alone, [slot], query[row : row + 1])[0], output[row])
    assert_same(on_cpu(alone), on_cpu(together))


def test_rows_of_query_and_output_may_be_apart():
    """Of the CPU's kernels: GPUs take them packed."""
    state = filled(CPU, "k8v4-k4v2", [50, 21])
    wide = torch.randn(2, 24, 64).bfloat16()
    query, output = wide[:, 8:16], torch.zeros(2, 24, 64).bfloat16()
    other = copy_of(state)

    cpu.attend(state, 0, ints(0, 1), query, 0.125, output[:, :8])

    assert torch.equal(output[:, :8], attended(CPU, other, [0, 1], query.contiguous()))
    assert not output[:, 8:].any()


def test_wrong_tensors_are_refused(kernels):
    state = kernels.place(make_state("k8v4"))
    slots, query = ints(0), torch.zeros(1, 4, 64).bfloat16()
    with pytest.raises(ValueError, match=r"query must .* 2 heads"):
        kernels.attend(state, 0, slots, query[:, :3], 1.0, query)
    with pytest.raises(ValueError, match="output must be"):
        kernels.attend(state, 0, slots, query, 1.0, query.float())
    with pytest.raises(ValueError, match="slots must be"):
        kernels.attend(state, 0, slots.repeat(2), query, 1.0, query)
    new = NewTokens(kernels.plan_decode(state, slots, ints(1)), query[:, :2], query[:, :1])
    with pytest.raises(ValueError, match=r"^value must be"):
        kernels.attend(state, 0, slots, query, 1.0, query, None, new)
