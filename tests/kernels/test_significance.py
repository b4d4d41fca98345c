"""Significance sums of prompts agree with the reference, and add up."""

import pytest
import torch
from make import DTYPES

from diffkv import reference


def make_case(lens_q, lens_k, head_dim=64, kv_heads=2, group=3, dtype=torch.float32, lens_own=None):
    """Packed queries and keys of several requests, and where the tokens are whose sums are wanted."""
    lens_own = lens_k if lens_own is None else lens_own
    starts = [
        torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32)
        for lens in (lens_q, lens_k, lens_own)
    ]
    query = torch.randn(sum(lens_q), kv_heads * group, head_dim).to(dtype)
    key = torch.randn(sum(lens_k), kv_heads, head_dim).to(dtype)
    return query, key, *starts, sum(lens_own), head_dim**-0.5


def check(kernels, case, max_queries=64, rounding=2e-5):
    got = kernels.significance(*case, max_queries)
    expected = reference.significance(*case, max_queries)
    assert got.dtype == torch.float32
    # A GPU multiplies float32 in three parts, whose error grows with the scores
    rtol = rounding if kernels.device == "cpu" else 1e-3
    torch.testing.assert_close(got, expected, rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_head_dims_and_dtypes(kernels, head_dim, dtype):
    check(kernels, make_case([70], [150], head_dim, dtype=dtype))


@pytest.mark.parametrize("group", [1, 2, 4, 7, 16])
def test_groups(kernels, group):
    check(kernels, make_case([70, 3], [150, 3], group=group))


@pytest.mark.parametrize("num", [1, 2, 63, 64, 65, 127, 128, 129, 700])
def test_lengths(kernels, num):
    check(kernels, make_case([num], [num]))


def test_ragged_requests_and_later_chunks(kernels):
    check(kernels, make_case([1, 64, 5, 0, 100, 13], [1, 64, 300, 0, 1000, 13]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lens_own", [[0, 0, 0], [300, 128, 13], [1, 130, 12], [44, 128, 0], [172, 3, 1], [173, 256, 0]]
)
def test_sums_of_the_last_tokens_alone_are_the_same(kernels, lens_own, dtype):
    """Bit for bit those that they have among all tokens."""
    lens_k = [300, 256, 13]
    torch.manual_seed(1)
    every = make_case([64, 30, 13], lens_k, dtype=dtype)
    torch.manual_seed(1)
    case = make_case([64, 30, 13], lens_k, dtype=dtype, lens_own=lens_own)
    check(kernels, case)
    parts = kernels.significance(*every, 64).split(lens_k, 1)
    last = [part[:, n - own :] for part, n, own in zip(parts, lens_k, lens_own, strict=True)]
    assert torch.equal(kernels.significance(*case, 64), torch.cat(last, 1))


@pytest.mark.parametrize("max_queries", [1, 5, 7, 100, 1000])
def test_max_queries(kernels, max_queries):
    check(kernels, make_case([90, 7], [200, 7]), max_queries)


def test_request_without_queries_gets_zeros(backend):
    case = make_case([0, 5], [10, 20])
    check(backend, case)
    assert not backend.significance(*case, 64)[:, :10].any()


def test_large_scores(kernels):
    query, key, *rest = make_case([64], [300])
    # Scores of hundreds are rounded to some 1e-5, and so are the logarithms of probabilities
    check(kernels, (query * 30, key * 3, *rest), rounding=5e-4)


def test_sums_of_a_head_are_its_queries(backend):
    query, key, *rest = make_case([64], [500], group=1)
    sums = backend.significance(query, key, *rest, 64)
    torch.testing.assert_close(sums.sum(1), torch.full((2,), 64.0), rtol=1e-5, atol=0)


def test_rows_may_be_apart(backend):
    query, key, *rest = make_case([40], [40], group=1)
    packed = torch.cat([query, key], dim=1)
    got = backend.significance(packed[:, :2], packed[:, 2:], *rest, 64)
    assert torch.equal(got, backend.significance(query, key, *rest, 64))


def test_wrong_tensors_are_refused(kernels):
    query, key, starts_q, starts_k, own, *rest = make_case([4], [4])
    with pytest.raises(ValueError, match="query"):
        kernels.significance(query.half(), key, starts_q, starts_k, own, *rest, 64)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        kernels.significance(query, key, starts_q, starts_k.long(), own, *rest, 64)
    with pytest.raises(ValueError, match="cu_seqlens_own"):
        kernels.significance(query, key, starts_q, starts_k, own[:1], *rest, 64)
    with pytest.raises(ValueError, match="num_own must be 0 to the number of tokens, 4, got 5"):
        kernels.significance(query, key, starts_q, starts_k, own, 5, rest[1], 64)


def lse_of(query, key, starts_q, starts_k, own, num_own, scale):
    """[num_q_heads, num_query_tokens]: what attention finds."""
    group, found = query.shape[1] // key.shape[1], []
    for r in range(len(starts_k) - 1):
        q, k = query[starts_q[r] : starts_q[r + 1]], key[starts_k[r] : starts_k[r + 1]]
        k = k.double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q))
        found.append(scores.masked_fill(~seen, float("-inf")).logsumexp(-1))
    return torch.cat(found, 1).float()


@pytest.mark.parametrize("max_queries", [5, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_attention_has_found_is_not_computed_again(backend, dtype, max_queries):
    lens_k, lens_own = [1, 64, 150, 300], [1, 9, 5, 200]
    case = make_case([1, 64, 5, 70], lens_k, dtype=dtype, lens_own=lens_own)
    lse = lse_of(*case)
    apart = torch.cat([lse, lse], 1)[:, : lse.shape[1]]
    expected = backend.significance(*case, max_queries)
    got = backend.significance(*case, max_queries, apart)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        got, reference.significance(*case, max_queries, lse), rtol=1e-4, atol=1e-5
    )
    half = backend.significance(*case, max_queries, lse + 0.6931472)
    torch.testing.assert_close(half, got / 2, rtol=1e-4, atol=1e-5)


def test_wrong_log_sum_exps_are_refused(kernels):
    case = make_case([4], [4])
    with pytest.raises(ValueError, match="lse"):
        kernels.significance(*case, 64, torch.zeros(6, 5))
