"""Requests from their prompts to their release: every byte as the reference has it."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from backends import CPU, Backend, Pair, ints
from make import FORMATS, make_state
from test_attend import LAYOUTS, check

from diffkv import pool
from diffkv.layout import PageLayout
from diffkv.quant import ConfigError, QuantConfig


@contextlib.contextmanager
def lived(kernels: Backend, steps: int, *args, **options) -> Iterator[tuple[Pair, torch.Tensor]]:
    """After prompts and some steps, and before the release: the pools, and places [steps, R, L, H, 4].

    The first request demotes and evicts, the second drops, the third keeps everything.
    """
    state = make_state(*args, max_tokens=96, window=4, **options)
    state.prompt_lens.copy_(ints(40, 33, 5))
    state.thresholds.copy_(torch.tensor([[1e6, 1.0], [3.0, 1e6], [0.0, 0.0]]))
    pair, places = Pair(kernels, state), []
    for layer in range(state.num_layers):
        pair.store([0, -1, 2, 1], [40, 7, 5, 33], layer)
        pair.store([2], [1], layer, starts=[5])
        pair.gather(layer, [0, 2], [41, 7])
    for i in range(steps):
        places.append(pair.step([0, -1, 2, 1], [41 + i, 3, 7 + i, 34 + i]).places)
    pool.check_invariants(pair.state)
    yield pair, torch.stack(places)
    pair.release([2, -1], 0)
    pair.release([2, 0, 1])
    pool.check_invariants(pair.state)
    assert not state.num_tokens.any()


@pytest.mark.parametrize(("quant", "head_dim", "dtype", "group"), LAYOUTS)
def test_of_every_kind_of_layout(kernels, quant, head_dim, dtype, group):
    with lived(kernels, 2 if kernels.is_slow else 8, quant, head_dim, dtype):
        pass


def test_every_action_occurs(kernels):
    """What is compared is not only new tokens: demotions, evictions and drops, too."""
    with lived(kernels, 3, "k8v4-k4v2", num_kv_heads=4) as (pair, places):
        demotes = places[..., 2] >= 0
        assert demotes[:, 0].all() and not demotes[:, 2].any() and not demotes[:, 3].all()
        kept, most = int(pair.expected.num_tokens.sum()), places[..., 0].numel() + 79 * 4
        assert kept < most, "nothing was dropped or evicted"


def pairs() -> list[str]:
    """Pairs in which each of the original's formats is once the high and once the low one."""
    found, seen = [], set()
    for high, low in itertools.product(FORMATS, FORMATS):
        try:
            PageLayout.derive(QuantConfig.parse(f"{high}-{low}"), 64)
        except ConfigError:
            continue
        if not {(high, 0), (low, 1)} <= seen:
            seen |= {(high, 0), (low, 1)}
            found.append(f"{high}-{low}")
    return found


@pytest.mark.parametrize("quant", pairs())
def test_every_format_in_either_tier(quant):
    """Of the CPU's kernels: Triton's know of one tier what they know of the other."""
    with lived(CPU, 2, quant) as (pair, _):
        check(CPU, pair.expected, [0, -1, 2, 1], 2)
