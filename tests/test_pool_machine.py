"""Thousands of random operations on a small pool, against a dictionary."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from small_pool import (
    HEAD_DIM,
    MAX_MODEL_LEN,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_SLOTS,
    WINDOW,
    assert_only_counted,
    make_state,
    num_free,
    read,
    store,
    tensors,
)

from diffkv import pool, reference
from diffkv.ops import load
from diffkv.policy import DROPPED, HIGH, LOW

GROUP = 2
"""Query heads of a KV head."""

ALPHAS = ((0.0, 0.0), (3.0, 0.0), (3.0, 1.0), (6.0, 2.0), (16.0, 0.5))
SUMS = (0.0, 0.25, 0.25, 0.5, 1.0, 4.0)
"""Few values, so that many tokens of a head are equal."""


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are tiny here: threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=["reference", "cpu"])
def ops(request):
    return load("cpu", request.param)


class Vectors:
    """A few (key, value) pairs, and what they read as once stored high, low, or high and then low."""

    def __init__(self, quant):
        self.key = torch.randn(61, HEAD_DIM, generator=torch.Generator().manual_seed(0))
        self.key[0] = 3.0
        high, low = quant.high, quant.low or quant.high
        pairs = self.key, -self.key
        as_high = self._stored(pairs, high)
        read = {
            "high": as_high,
            "low": self._stored(pairs, low),
            "demoted": self._stored(as_high, low),
        }
        self.read = {name: (k.numpy(), v.numpy()) for name, (k, v) in read.items()}

    @staticmethod
    def _stored(pairs, fmt):
        sides = zip(pairs, (fmt.k_bits, fmt.v_bits), (fmt.k_groups, fmt.v_groups), strict=True)
        return tuple(
            reference.dequantize(*reference.quantize(x, bits, groups), bits, torch.float32)
            for x, bits, groups in sides
        )


@dataclass
class Token:
    """What the dictionary knows of a kept token: its sum, and which vector it reads as."""

    tier: int
    total: np.float32
    vector: int
    stored_as: str


@dataclass
class Request:
    """A running request: (layer, head) -> position -> Token."""

    prompt_len: int
    num_tokens: int
    alphas: tuple
    kept: dict


class PoolMachine(RuleBasedStateMachine):
    """Random operations on a small pool and on a dictionary; subclasses say with which kernels."""

    ops = reference
    quant = "k8v4-k4v2"
    page_bytes = 128
    num_pages = 26
    operations: ClassVar[Counter] = Counter()
    decisions: ClassVar[Counter] = Counter()

    def __init__(self):
        super().__init__()
        self.state = make_state(self.quant, self.page_bytes, self.num_pages)
        self.vectors = Vectors(self.state.layout.quant)
        self.has_low = self.state.layout.low is not None
        self.per_page = [tier.tokens_per_page for tier in self.state.layout.tiers]
        self.requests = {}
        self.rnd = random.Random(0)

    # What may happen.

    @rule(seed=st.integers(0, 2**16))
    @precondition(lambda self: len(self.requests) < NUM_SLOTS)
    def start(self, seed):
        """Prompts of one or two requests, in one call for each layer, with a row that is padding."""
        self.rnd.seed(seed)
        free = [slot for slot in range(NUM_SLOTS) if slot not in self.requests]
        slots = self.rnd.sample(free, min(len(free), self.rnd.choice((1, 1, 2))))
        rows = [(slot, list(range(self.rnd.randint(1, 7)))) for slot in slots]
        for slot, positions in rows:
            alphas = self.rnd.choice(ALPHAS)
            alphas = alphas if self.has_low else (alphas[1], alphas[1])
            self.requests[slot] = Request(len(positions), len(positions), alphas, {})
            self.state.thresholds[slot] = torch.tensor(alphas)
            self.state.prompt_lens[slot] = len(positions)
        if self.rnd.random() < 0.3:
            rows.insert(self.rnd.randint(0, len(rows)), (-1, [0, 1]))
        for layer in range(NUM_LAYERS):
            self.store(layer, rows)

    @rule(seed=st.integers(0, 2**16))
    @precondition(lambda self: self.requests)
    def restore(self, seed):
        """One layer of a request is released and its tokens are tiered anew, sums and all."""
        self.rnd.seed(seed)
        slot = self.rnd.choice(sorted(self.requests))
        layer = self.rnd.randrange(NUM_LAYERS)
        self.release([slot], layer)
        self.store(layer, [(slot, list(range(self.requests[slot].num_tokens)))])

    @rule(seed=st.integers(0, 2**16))
    @precondition(lambda self: any(r.num_tokens < MAX_MODEL_LEN for r in self.requests.values()))
    def decode(self, seed):
        """A step of some requests: one plan, and the new tokens of every layer."""
        self.rnd.seed(seed)
        able = [s for s, r in sorted(self.requests.items()) if r.num_tokens < MAX_MODEL_LEN]
        slots = self.rnd.sample(able, self.rnd.randint(1, len(able)))
        if self.rnd.random() < 0.3:
            slots.insert(self.rnd.randint(0, len(slots)), -1)
        lens = [self.requests[s].num_tokens + 1 if s >= 0 else 0 for s in slots]
        heads = [
            (s, head) for s in slots if s >= 0 for head in np.ndindex(NUM_LAYERS, NUM_KV_HEADS)
        ]
        decisions = [self.decide(self.requests[slot], head) for slot, head in heads]
        before, overrun = tensors(self.state), sum(d[0] for d in decisions) > num_free(self.state)

        int32 = {"dtype": torch.int32}
        plan = self.ops.plan_decode(
            self.state, torch.tensor(slots, **int32), torch.tensor(lens, **int32)
        )
        chosen = torch.tensor([self.rnd.randrange(61) for _ in slots])
        key = self.vectors.key[chosen][:, None].expand(-1, NUM_KV_HEADS, -1).contiguous()
        for layer in range(NUM_LAYERS):
            self.ops.append(self.state, layer, plan, key, -key)

        self.count("plan_decode", 1)
        self.count("append", NUM_LAYERS)
        padding = [r for r, slot in enumerate(slots) if slot < 0]
        assert (plan.places[padding] == -1).all()
        if overrun:
            self.decisions["overrun"] += 1
            assert (plan.places == -1).all()
            assert_only_counted(self.state, before)
            return
        vectors = dict(zip(slots, chosen.tolist(), strict=True))
        for (slot, head), decision in zip(heads, decisions, strict=True):
            self.apply(self.requests[slot], head, decision, vectors[slot])
        for slot in slots:
            if slot >= 0:
                self.requests[slot].num_tokens += 1

    @rule(seed=st.integers(0, 2**16), layer=st.integers(0, NUM_LAYERS - 1))
    @precondition(lambda self: self.requests)
    def attend(self, seed, layer):
        """One query of every request: sums grow by what a softmax over the dictionary's keys says."""
        slots = [*sorted(self.requests), -1]
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(len(slots), NUM_KV_HEADS * GROUP, HEAD_DIM, generator=generator)
        output = torch.full_like(query, torch.nan)
        rows = torch.tensor(slots, dtype=torch.int32)
        self.ops.attend(self.state, layer, rows, query, 0.5, output)
        self.count("attend", 1)
        assert (output[-1] == 0).all()
        after = read(self.state)
        for r, slot in enumerate(slots[:-1]):
            for head in range(NUM_KV_HEADS):
                group = slice(head * GROUP, (head + 1) * GROUP)
                kept = self.requests[slot].kept.get((layer, head), {})
                self.check_attention(query[r, group], kept, output[r, group])
                for positions, totals, *_ in after[slot, layer, head]:
                    for position, total in zip(positions.tolist(), totals, strict=True):
                        assert total == pytest.approx(kept[position].total, rel=1e-5, abs=1e-6)
                        kept[position].total = total  # equal up to rounding: go on from the same

    @rule(seed=st.integers(0, 2**16))
    @precondition(lambda self: self.requests)
    def finish(self, seed):
        """Some requests end."""
        self.rnd.seed(seed)
        slots = self.rnd.sample(sorted(self.requests), self.rnd.randint(1, len(self.requests)))
        self.release([*slots, -1], -1)
        for slot in slots:
            del self.requests[slot]

    @rule(seed=st.integers(0, 2**16), layer=st.integers(0, NUM_LAYERS - 1))
    @precondition(lambda self: self.requests)
    def release_layer(self, seed, layer):
        """One layer of a request is given back."""
        self.rnd.seed(seed)
        self.release([self.rnd.choice(sorted(self.requests))], layer)

    # What must hold after each of them.

    @invariant()
    def the_pool_is_what_the_dictionary_says(self):
        pool.check_invariants(self.state)
        contents = read(self.state)
        for (slot, layer, head), stored in contents.items():
            kept = self.requests[slot].kept.get((layer, head), {}) if slot in self.requests else {}
            assert sum(len(tier[0]) for tier in stored) == len(kept)
            for tier, (positions, totals, keys, values) in enumerate(stored):
                for i, position in enumerate(positions.tolist()):
                    token = kept[position]
                    k, v = self.vectors.read[token.stored_as]
                    assert token.tier == tier
                    assert token.total == totals[i]
                    assert np.array_equal(k[token.vector], keys[i])
                    assert np.array_equal(v[token.vector], values[i])

    # The same in the dictionary.

    def count(self, name, number):
        self.operations[name] += number

    def store(self, layer, rows):
        num_tokens = sum(len(positions) for _, positions in rows)
        choices = (HIGH, HIGH, LOW, DROPPED) if self.has_low else (HIGH, HIGH, DROPPED)
        tiers = [self.rnd.choices(choices, k=num_tokens) for _ in range(NUM_KV_HEADS)]
        sums = [self.rnd.choices(SUMS, k=num_tokens) for _ in range(NUM_KV_HEADS)]
        chosen = [[self.rnd.randrange(61) for _ in range(NUM_KV_HEADS)] for _ in range(num_tokens)]
        entered, wanted, start = [], 0, 0
        for slot, positions in rows:
            for head in range(NUM_KV_HEADS) if slot >= 0 else ():
                tokens = {
                    position: Token(
                        tiers[head][i], np.float32(sums[head][i]), chosen[i][head], name
                    )
                    for i, position in enumerate(positions, start)
                    if (name := ("high", "low", None)[tiers[head][i]])
                }
                entered.append((slot, head, tokens))
                for tier, per_page in enumerate(self.per_page):
                    wanted += -(-sum(t.tier == tier for t in tokens.values()) // per_page)
            start += len(positions)
        before, overrun = tensors(self.state), wanted > num_free(self.state)
        store(
            self.ops, self.state, layer, rows, tiers, sums, self.vectors.key[torch.tensor(chosen)]
        )
        self.count("store_prompt", 1)
        if overrun:
            self.decisions["overrun"] += 1
            assert_only_counted(self.state, before)
            return
        for slot, head, tokens in entered:
            self.requests[slot].kept[layer, head] = tokens

    def release(self, slots, layer):
        self.ops.release(self.state, torch.tensor(slots, dtype=torch.int32), layer)
        self.count("release", 1)
        for slot in slots:
            if slot >= 0:
                kept = self.requests[slot].kept
                self.requests[slot].kept = {
                    key: tokens for key, tokens in kept.items() if key[0] != layer and layer >= 0
                }

    def decide(self, request, head):
        """(pages wanted, action, high victim, low victim): the published rule, in plain Python."""
        kept, n = request.kept.get(head, {}), request.num_tokens
        least = [(np.float32(np.inf), -1), (np.float32(np.inf), -1)]
        for position, token in kept.items():
            first = max(position, request.prompt_len - 64)
            first = first if position < request.prompt_len else position
            if position <= n - WINDOW:
                mean = token.total / np.float32(n - first)
                least[token.tier] = min(least[token.tier], (mean, position))
        (mean_high, high), (mean_low, low) = least
        alpha_high, alpha_low = (min(np.float32(a) / np.float32(n), 1) for a in request.alphas)
        if mean_high < alpha_low and mean_high < mean_low:
            return 0, "drop", high, low
        if self.has_low and mean_high < alpha_high:
            if mean_low < alpha_low:
                return 0, "demote and evict", high, low
            return self.opens_page(kept, LOW), "demote", high, low
        return self.opens_page(kept, HIGH), "append", high, low

    def opens_page(self, kept, tier):
        return int(sum(t.tier == tier for t in kept.values()) % self.per_page[tier] == 0)

    def apply(self, request, head, decision, vector):
        _, action, high, low = decision
        kept = request.kept.setdefault(head, {})
        self.decisions[action] += 1
        if action == "demote and evict":
            del kept[low]
        if action == "drop":
            del kept[high]
        elif action != "append":
            kept[high].tier, kept[high].stored_as = LOW, "demoted"
        kept[request.num_tokens] = Token(HIGH, np.float32(0), vector, "high")

    def check_attention(self, query, kept, output):
        """Compare the output, and let the dictionary's sums grow."""
        if not kept:
            assert (output == 0).all()
            return
        pairs = [self.vectors.read[token.stored_as] for token in kept.values()]
        chosen = [token.vector for token in kept.values()]
        key = np.stack([k[vector] for (k, _), vector in zip(pairs, chosen, strict=True)])
        value = np.stack([v[vector] for (_, v), vector in zip(pairs, chosen, strict=True)])
        probs = (query @ torch.from_numpy(key).T * 0.5).softmax(-1)
        assert torch.allclose(output, probs @ torch.from_numpy(value), rtol=1e-4, atol=1e-5)
        for token, p in zip(kept.values(), probs.amax(0).tolist(), strict=True):
            token.total += np.float32(p)


def run_machine(ops, quant, page_bytes, num_pages, num_examples):
    """Returns how often each operation ran, and each decision fell."""
    operations, decisions = Counter(), Counter()
    facts = dict(ops=ops, quant=quant, page_bytes=page_bytes, num_pages=num_pages)
    facts |= dict(operations=operations, decisions=decisions)
    run_state_machine_as_test(
        type("Machine", (PoolMachine,), facts),
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=100,
            deadline=None,
            derandomize=True,  # the same operations everywhere: a red run can be repeated
            suppress_health_check=list(HealthCheck),
        ),
    )
    return operations, decisions


def test_random_operations_on_two_tiers(ops):
    operations, decisions = run_machine(ops, "k8v4-k4v2", 96, 32, num_examples=80)
    assert operations.total() >= 10_000, operations
    names = {"append", "drop", "demote", "demote and evict", "overrun"}
    assert names == {name for name, number in decisions.items() if number >= 50}, decisions


def test_random_operations_on_one_exact_tier(ops):
    operations, decisions = run_machine(ops, "k16v16", 160, 22, num_examples=20)
    assert operations.total() >= 2_000, operations
    names = {"append", "drop", "overrun"}
    assert names == {name for name, number in decisions.items() if number >= 50}, decisions
