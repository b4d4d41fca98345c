"""A layer of a step with prompts: how many kernels it launches, and that it waits for none of them."""

import weakref
from collections import Counter

import pytest
import torch
from backends import INTERPRETED
from make import make_state
from test_no_sync import Recorder
from triton.runtime.interpreter import InterpretedFunction

from diffkv import chains, prompts
from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.kernels import triton as kernels
from diffkv.kernels.triton.workspace import workspace
from diffkv.policies import parse
from diffkv.policy import Thresholds
from diffkv.rotation import signs

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter would launch")

SEGMENT, HEADS, GROUP, HEAD_DIM = 128, 2, 2, 64

REST = 40
"""Tokens of a prompt that come in a later step, so that a step ends with a segment."""

ROW = Counter(
    _lse_kernel=1, _merge_kernel=1, _sum_kernel=1,
    _decide_kernel=1,
    _centre_kernel=1,
    _count_kernel=1, _enter_kernel=1, _write_kernel=1,
)  # fmt: skip
"""Scoring, deciding and storing: of all complete rows of a wave at once."""

TURN = Counter(_rotate_kernel=2)
"""Rotating a chunk's keys and values, for all of its waves at once."""

READ = Counter(_gather_kernel=1, _rotate_kernel=1)
"""Reading a row back, for what follows in its chunk; both sides are turned back at once."""

WAIT = Counter(_count_kernel=1, _enter_kernel=1, _write_kernel=1)
RELEASE = Counter(_count_kernel=1, _give_back_kernel=1)


@pytest.fixture
def launches(monkeypatch):
    """Kernels are counted and not run."""
    names = Counter()
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: names.update([self.fn.__name__])
    )
    return names


class Run:
    """Steps of prompts, of which one layer is counted."""

    def __init__(self, launches, policy="paper", says_lse=False):
        self.launches, self.attended, self.says_lse = launches, 0, says_lse
        state = make_state(
            "k8v4-k4v2", HEAD_DIM, num_layers=1, num_slots=40, max_tokens=2048, num_pages=64,
            window=64, segment=SEGMENT, drops=False,
        )  # fmt: skip
        self.cache = DiffKVCache(
            state, kernels, 0.125, parse(policy), self.prefill, signs(HEAD_DIM), SEGMENT
        )
        self.free = list(range(20, 40))
        self.stored = {}

    def prefill(self, query, key, value, spans, scale, output):
        """Stands for flash-attention, which is one call."""
        assert len(query) == sum(spans.num_queries) and len(key) == sum(spans.num_keys)
        assert query.stride()[1:] == key.stride()[1:] == (HEAD_DIM, 1)
        self.attended += 1
        return torch.zeros(query.shape[1], len(query)) if self.says_lse else None

    def open(self, slot, prompt_len):
        self.cache.open(slot, prompt_len, Thresholds(3, 0))
        self.stored[slot] = (0, prompt_len, 0)

    def step(self, first_row=0, **ends):
        """A step in which the prompts of slots come so far: launches, operations, attentions."""
        chunks, row = [], first_row
        for name, end in ends.items():
            slot = int(name[1:])
            before, prompt_len, start = self.stored[slot]
            rows = self.cache.ends(slot).up_to(start, end)
            closing = tuple(self.free.pop() for _ in rows)
            chunks.append(
                PromptChunk(slot, slice(row, row + end - before), before, prompt_len, closing)
            )
            self.stored[slot] = (end, prompt_len, [start, *rows][-1])
            row += end - before
        none = torch.empty(0, dtype=torch.int32)
        step = self.cache.plan(chunks, slice(0, 0), none, none)
        heads = HEADS * (GROUP + 2)
        vectors = (
            torch.zeros(row, heads, HEAD_DIM).bfloat16().split([HEADS * GROUP, HEADS, HEADS], 1)
        )
        output = torch.zeros_like(vectors[0]).contiguous()
        self.launches.clear()
        self.attended = 0
        with Recorder() as recorder:
            self.cache.attend(0, step, *vectors, output)
        return +self.launches, Counter(filter(launched, recorder.operations)), self.attended


def launched(operation):
    """Whether an operation launches a kernel, or copies."""
    # What is empty is filled by the tests' own `poison_empty`
    none = ("aten.empty", "aten.new_empty", "aten.unbind", "aten.split", "aten.fill_")
    return not operation.startswith(none)


def used(run):
    """A cache that has done some steps: values are not looked at any more, and buffers are there."""
    run.cache._prompts.value_range._looks[0] = 1 << 30
    run.cache._prompts._undecided(SEGMENT)
    for state in (run.cache.state, run.cache._prompts.exact):
        workspace(state)
    return run


@pytest.mark.parametrize("num", [1, 5])
def test_segments_of_several_prompts_cost_as_many_launches_as_one(launches, num):
    run = used(Run(launches))
    ends = {f"s{slot}": SEGMENT for slot in range(num)}
    for slot in range(num):
        run.open(slot, SEGMENT + REST)
    kernels_of_layer, others, attended = run.step(first_row=3, **ends)
    assert kernels_of_layer == TURN + ROW
    assert attended == 1
    assert others == (Counter() if num == 1 else Counter({"aten.index": 1})), "scoring queries"


@pytest.mark.parametrize("num_segments", [2, 6])
def test_each_segment_of_a_long_prompt(launches, num_segments):
    run = used(Run(launches))
    run.open(0, num_segments * SEGMENT + REST)
    kernels_of_layer, others, attended = run.step(s0=num_segments * SEGMENT)
    expected = +TURN
    for _ in range(num_segments):
        expected += ROW
    for _ in range(num_segments - 1):
        expected += READ
    assert kernels_of_layer == expected
    assert attended == num_segments
    assert others == Counter({"aten.copy_": 2}), "of the chunk's keys and values, once"
    assert sum(ROW.values()) + sum(READ.values()) + 1 <= 11


def test_chunks_that_wait(launches):
    run = used(Run(launches))
    run.open(0, SEGMENT + REST)
    kernels_of_layer, others, attended = run.step(s0=100)
    assert (kernels_of_layer, attended) == (WAIT, 1)
    assert others == Counter({"aten.cat": 1}), "queries that are kept"
    kernels_of_layer, others, attended = run.step(s0=SEGMENT)
    assert kernels_of_layer == TURN + ROW + RELEASE + Counter(_gather_kernel=1)
    assert attended == 1
    assert others == Counter({"aten.copy_": 2, "aten.cat": 1}), "and queries that had waited"


def test_requests_that_go_on_are_joined(launches):
    run = used(Run(launches))
    for slot in range(3):
        run.open(slot, 2 * SEGMENT + REST)
    run.step(s0=SEGMENT, s1=SEGMENT, s2=SEGMENT)
    kernels_of_layer, others, attended = run.step(s0=2 * SEGMENT, s1=2 * SEGMENT, s2=2 * SEGMENT)
    assert kernels_of_layer == TURN + ROW + READ
    assert attended == 1
    # The chunks' keys and values, put where the rows before them were read to; scoring queries
    assert others == Counter({"aten.index_put_": 2, "aten.index": 1})


def test_what_requests_see_is_in_memory_in_turns_where_it_is_much(launches, monkeypatch):
    """Two see 256 tokens each, which is as much as there may be; the third attends after them."""
    run = used(Run(launches))
    token_bytes = 2 * HEADS * HEAD_DIM * 2
    monkeypatch.setattr(chains, "SEEN_BYTES", 2 * 2 * SEGMENT * token_bytes)
    for slot in range(3):
        run.open(slot, 2 * SEGMENT + REST)
    run.step(s0=SEGMENT, s1=SEGMENT, s2=SEGMENT)
    assert run.attended == 1
    alive, most = weakref.WeakSet(), []
    see = prompts.Seen.__init__

    def seen(self, *args):
        see(self, *args)
        alive.add(self)
        most.append(len(alive))

    monkeypatch.setattr(prompts.Seen, "__init__", seen)
    _, _, attended = run.step(s0=2 * SEGMENT, s1=2 * SEGMENT, s2=2 * SEGMENT)
    assert (attended, most) == (2, [1, 2, 1])


@pytest.mark.parametrize("num", [1, 3])
def test_what_attention_says_is_not_found_again(launches, num):
    run = used(Run(launches, says_lse=True))
    for slot in range(num):
        run.open(slot, 2 * SEGMENT + REST)
    kernels_of_layer, others, _ = run.step(**{f"s{slot}": SEGMENT for slot in range(num)})
    assert kernels_of_layer == TURN + ROW - Counter(_lse_kernel=1, _merge_kernel=1)
    assert others["aten.index"] == (0 if num == 1 else 2)


@pytest.mark.parametrize(
    ("num", "expected"),
    [
        (1, Counter({"aten.copy_": 2})),  # the last tokens' keys and values
        # Of both waves rotated keys and values; keys and queries that score; the last tokens' vectors
        (5, Counter({"aten.index": 9, "aten.index_put_": 3})),
    ],
)
def test_whole_prompts_have_two_waves(launches, num, expected):
    """Their last tokens are in open rows, and read the rows before them. Only these are put together."""
    run = used(Run(launches))
    for slot in range(num):
        run.open(slot, SEGMENT)
    kernels_of_layer, others, attended = run.step(**{f"s{slot}": SEGMENT for slot in range(num)})
    assert kernels_of_layer == TURN + ROW + READ + ROW
    assert (attended, others) == (2, expected)


def test_a_policy_that_looks_at_keys_has_its_pages_filled_likewise(launches):
    run = used(Run(launches, "paper:distinct=0.5"))
    run.open(0, SEGMENT + REST)
    kernels_of_layer, _, _ = run.step(s0=SEGMENT)
    assert kernels_of_layer == TURN + ROW
