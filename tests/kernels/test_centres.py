"""Centres, and rows whose tokens wait as the model made them: what a pool gives back."""

import dataclasses

import pytest
import torch
from backends import Pair, gather, ints
from make import DTYPES, make_state, make_tokens, set_chain

from diffkv.pool import check_invariants

QUANTS = ("k8v4-k4v2", "k8v2-k2v1g1x4", "k8v16-k4v8", "k1v1")


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [*zip(QUANTS[:3], DTYPES, strict=True), (QUANTS[0], DTYPES[1]), (QUANTS[3], DTYPES[1])],
)
def test_pages_are_the_same_bytes(kernels, quant, dtype):
    """Of prompts, of generated tokens and of those that are demoted."""
    state = make_state(quant, 80, dtype, num_layers=2, max_tokens=96, window=2, centres=20.0)
    state.thresholds[:2] = torch.tensor([[1e6, 0.0], [3.0, 0.2]])
    pair = Pair(kernels, state)
    for layer in range(2):
        pair.store([1, 0], [31, 44], layer)
    for step in range(2 if kernels.is_slow else 8):
        pair.step([0, 1], [45 + step, 32 + step])
    for layer in range(2):
        pair.gather(layer, [1, 0], [50, 60])


def test_what_is_common_costs_no_precision(backend):
    """Where keys are a centre and little more, errors are those of the little.

    Half a step, and up to a quarter more at the ends, since what is stored is not the codes' own grid.
    """
    state = backend.place(make_state("k4v4", 64, torch.float32, num_slots=1, centres=50.0))
    tokens = make_tokens(state, [0], [40])
    backend.store_prompt(state, 0, tokens, torch.zeros(2, 40, dtype=torch.int8), torch.zeros(2, 40))

    key, _, _ = gather(backend, state, 0, [0], [40])

    little = tokens.key - state.centres[0, 0].float().cpu()
    levels = (little.amax(-1) - little.amin(-1)) / 15
    assert ((key - tokens.key).abs().amax(-1) <= 0.75 * levels + 1e-4).all()


def test_appended_tokens_have_centres(backend):
    state = backend.place(make_state("k8v4", 64, torch.float32, centres=50.0))
    tokens = make_tokens(state, [0], [3])
    for i in range(3):
        plan = backend.plan_decode(state, ints(0), ints(i + 1))
        one = (each[i : i + 1].contiguous() for each in (tokens.key, tokens.value))
        backend.append(state, 0, plan, *one)

    key, _, _ = gather(backend, state, 0, [0], [3])

    assert (key - tokens.key).abs().max() < 0.02, (
        "half a level of 8 bits of keys that are a few apart"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", ["k8v4-k4v2", "k8v4", "k16v16"])
def test_waiting_tokens_come_back_as_they_were(backend, quant, dtype):
    """In one pool with ordinary rows, in several steps, and more of them than a leaf's pages hold."""
    sizes = {"num_layers": 2, "num_slots": 4, "max_tokens": 160, "segment": 64}
    state = backend.place(make_state(quant, dtype=dtype, **sizes))
    exact = state.exact()
    prompt, late = make_tokens(state, [2, 0], [90, 3]), make_tokens(state, [2, 0], [1, 70], [90, 3])
    backend.fill(state, [0, 50])
    for layer in range(2):
        for tokens, num in ((prompt, 93), (late, 71)):
            tiers = torch.zeros(2, num, dtype=torch.int8)
            backend.store_prompt(exact, layer, tokens, tiers, torch.zeros(2, num))
        check_invariants(state, waiting=[0, 2])

    key, value, tiers = gather(backend, exact, 1, [0, 2], [75, 91], first=4)

    for got, first, second in ((key, prompt.key, late.key), (value, prompt.value, late.value)):
        assert torch.equal(got[4:77], torch.cat([first[90:], second[1:]]))
        assert not got[77:79].any()
        assert torch.equal(got[79:], torch.cat([first[:90], second[:1]]))
        assert (got[:4] == 7).all()
    assert not tiers[:, 4:77].any() and (tiers[:, 77:79] == 2).all() and not tiers[:, 79:].any()


def test_waiting_and_ordinary_rows_take_turns(kernels):
    """Pages that held the ones hold the others next, byte for byte as the reference has it."""
    state = make_state("k8v4-k4v2", num_layers=2, num_slots=3, max_tokens=96, segment=32)
    pair = Pair(kernels, state)
    exact = pair.exact()
    for turn in range(3):
        for layer in range(2):
            exact.store([0], [40], layer, tiers=torch.zeros(2, 40, dtype=torch.int8))
            exact.store([0], [7], layer, tiers=torch.zeros(2, 7, dtype=torch.int8), starts=[40])
            pair.store([1], [30 + turn], layer)
        check_invariants(pair.state, waiting=[0])
        exact.gather(1, [0], [47])
        pair.gather(0, [1], [40])
        for layer in range(2):
            exact.release([0], layer)
            pair.store([0], [47], layer)
        check_invariants(pair.state)
        pair.gather(1, [1, 0], [40, 50])
        pair.release([0, 1])
    check_invariants(pair.state)
    assert not pair.expected.num_tokens.any()


@pytest.mark.parametrize("quant", ["k8v4", "k16v16"])
def test_centres_of_another_size_are_refused(kernels, quant):
    state = make_state(quant)
    dim = 64 - state.centre_dim
    wrong = kernels.place(dataclasses.replace(state, centres=torch.zeros(3, 1, 2, dim).bfloat16()))
    with pytest.raises(ValueError, match=r"state\.centres"):
        kernels.release(wrong, ints(0), -1)


def test_chains_are_checked(kernels):
    state = make_state("k8v4", segment=64)
    set_chain(state, 0, [1])
    wrong = kernels.place(dataclasses.replace(state, chains=state.chains.long()))
    with pytest.raises(ValueError, match=r"state\.chains"):
        kernels.release(wrong, ints(0), -1)
