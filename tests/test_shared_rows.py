"""Rows of a cache: prompts in segments and chunks, hits on closed rows, and a life of shared rows."""

import dataclasses
import random
from dataclasses import dataclass, field

import pytest
import torch

from diffkv import chains, ops, pool
from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.layout import PageLayout
from diffkv.policy import Thresholds
from diffkv.prefill import torch_prefill
from diffkv.quant import QuantConfig
from diffkv.rotation import signs_of
from diffkv.segments import RowEnds, first_message, longest_row, most_rows
from diffkv.shape import PoolShape

NUM_LAYERS, NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 2, 2, 16
NUM_SLOTS, NUM_PAGES, MAX_MODEL_LEN, WINDOW = 24, 2400, 96, 4
PROMPT, NEW, SEGMENT = 75, 5, 16
LONG = 128  # no prompt is so long: the rest of one is all there is
CHUNKS = ([75], [10, 20, 40, 75], [33, 64, 75], [16, 75], [1, 2, 15, 16, 17, 75])
NOBODY = torch.empty(0, dtype=torch.int32)
ALL_HIGH = Thresholds()


@pytest.fixture(params=["reference", None], ids=["reference", "cpu"])
def kernels(request):
    return request.param


def make_cache(quant, kernels, segment=SEGMENT, drops=False, rotate="none", prefill=torch_prefill):
    layout = PageLayout.derive(QuantConfig.parse(quant), HEAD_DIM, None, 4, drops)
    heads = (NUM_LAYERS, NUM_KV_HEADS)
    shape = PoolShape(layout, *heads, NUM_SLOTS, MAX_MODEL_LEN, NUM_PAGES, segment=segment)
    num_bytes = shape.table_bytes + NUM_PAGES * layout.page_bytes
    state = pool.create(shape, torch.zeros(num_bytes, dtype=torch.uint8), torch.float32, WINDOW)
    signs = signs_of(rotate, HEAD_DIM, state.pages.device)
    return DiffKVCache(
        state,
        ops.load("cpu", kernels),
        HEAD_DIM**-0.5,
        prefill=prefill,
        signs=signs,
        segment=segment,
    )


def vectors(num_tokens, seed=0, common=0.0):
    """Queries, keys and values of a sequence: [num_layers, num_tokens, heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    heads = (NUM_KV_HEADS * GROUP, NUM_KV_HEADS, NUM_KV_HEADS)
    query, key, value = (
        torch.randn(NUM_LAYERS, num_tokens, num, HEAD_DIM, generator=generator) for num in heads
    )
    bias = torch.randn(1, 1, NUM_KV_HEADS, HEAD_DIM, generator=generator)
    return query, key + common * bias, value


def exact(sequence):
    """What attention over the full cache gives: [num_layers, num_tokens, heads, head_dim]."""
    query, key, value = (x.transpose(1, 2) for x in sequence)
    key, value = (x.repeat_interleave(GROUP, 1) for x in (key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=HEAD_DIM**-0.5
    )
    return attended.transpose(1, 2)


@dataclass
class Request:
    """A request of a test: its rows, and how far it is."""

    slot: int
    prompt_len: int
    chain: tuple = ()
    starts: tuple = (0,)
    num_tokens: int = 0

    @property
    def waits(self):
        """Whether tokens of its open row wait for the rest of their segment."""
        return self.starts[-1] < self.num_tokens < self.prompt_len


@dataclass
class Run:
    """A cache, its requests, and the slots that are free."""

    cache: DiffKVCache
    segment: int = SEGMENT
    free: list = field(default_factory=lambda: list(range(NUM_SLOTS)))
    requests: list = field(default_factory=list)

    def open(self, prompt_len, thresholds, chain=(), starts=(0,)):
        request = Request(self.free.pop(0), prompt_len, chain, starts, starts[-1])
        self.cache.open(request.slot, prompt_len, thresholds, chain, starts)
        self.requests.append(request)
        return request

    def chunk(self, request, end, row=0):
        """A chunk of a prompt, whose tokens are from a row of the step's batch on."""
        first = request.num_tokens
        ends = self.cache.ends(request.slot).up_to(request.starts[-1], end)
        closing = tuple(self.free.pop(0) for _ in ends)
        request.chain, request.starts = (*request.chain, *closing), (*request.starts, *ends)
        request.num_tokens = end
        span = slice(row, row + end - first)
        return PromptChunk(request.slot, span, first, request.prompt_len, closing)

    def prefill(self, request, end, sequence):
        """One chunk of a prompt in a step of its own."""
        first = request.num_tokens
        step = self.cache.plan([self.chunk(request, end)], NOBODY.long(), NOBODY, NOBODY)
        return self.attend(step, sequence, first, end)

    def decode(self, request, sequence):
        """One generated token in a step of its own."""
        first = request.num_tokens
        request.num_tokens += 1
        slots, lengths = (torch.tensor([n], dtype=torch.int32) for n in (request.slot, first + 1))
        step = self.cache.plan((), slice(0, 1), slots, lengths)
        return self.attend(step, sequence, first, first + 1)

    def attend(self, step, sequence, first, end):
        outputs = []
        for layer in range(NUM_LAYERS):
            query, key, value = (x[layer, first:end] for x in sequence)
            output = torch.full_like(query, torch.nan)
            self.cache.attend(layer, step, query, key, value, output)
            outputs.append(output)
        self.check()
        return torch.stack(outputs)

    def check(self):
        waiting = [request.slot for request in self.requests if request.waits]
        pool.check_invariants(self.cache.state, waiting)

    def whole(self, sequence, chunks, thresholds, chain=(), starts=(0,)):
        """A prompt in chunks, then generated tokens: the outputs, and the request."""
        request = self.open(chunks[-1], thresholds, chain, starts)
        outputs = [self.prefill(request, end, sequence) for end in chunks if end > starts[-1]]
        outputs += [self.decode(request, sequence) for _ in range(NEW)]
        return torch.cat(outputs, 1), request

    def end(self, request, *more):
        """Release a request's open row, and other rows."""
        self.cache.release([request.slot, *more])
        self.free += [request.slot, *more]
        self.requests.remove(request)
        self.check()


@pytest.mark.parametrize("segment", [0, SEGMENT, 32, LONG])
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_exact_tokens_are_attended_exactly(kernels, segment, chunks):
    sequence = vectors(PROMPT + NEW)
    run = Run(make_cache("k16v16", kernels, segment), segment)
    outputs, request = run.whole(sequence, chunks, ALL_HIGH)
    torch.testing.assert_close(outputs, exact(sequence), atol=1e-5, rtol=1e-5)
    assert len(request.chain) == {0: 0, SEGMENT: 4, 32: 2, LONG: 1}[segment]
    run.end(request, *request.chain)
    head, tail = run.cache.state.ring_ends.tolist()
    assert tail - head == NUM_PAGES


@pytest.mark.parametrize(
    ("quant", "alphas", "drops", "rotate"),
    [
        ("k8v4-k4v2", (3, 0), False, "hadamard"),
        ("k8v4-k4v2", (1, 0.5), True, "hadamard"),
        ("k8v8", (0.7, 0.7), True, "none"),
    ],
)
@pytest.mark.parametrize("segment", [SEGMENT, LONG])
def test_hits_and_chunks_change_nothing(kernels, quant, alphas, drops, rotate, segment):
    """A row is the same whoever computed it, and in whatever chunks: tiers, and bytes after a hit."""
    sequence, thresholds = vectors(PROMPT + NEW), Thresholds(*alphas)
    cache = quant, kernels, segment, drops, rotate
    first = Run(make_cache(*cache), segment)
    outputs, request = first.whole(sequence, [PROMPT], thresholds)
    state = first.cache.state
    for chunks in CHUNKS[1:]:
        again = Run(make_cache(*cache), segment)
        chunked, other = again.whole(sequence, chunks, thresholds)
        torch.testing.assert_close(chunked, outputs, atol=1e-5, rtol=1e-5)
        rows, others = [*request.chain, request.slot], [*other.chain, other.slot]
        assert torch.equal(state.num_tokens[rows], again.cache.state.num_tokens[others])
    for hit in {1, len(request.chain) // 2 + 1, len(request.chain)}:
        chain, starts = request.chain[:hit], request.starts[: hit + 1]
        shared, other = first.whole(sequence, [PROMPT], thresholds, chain, starts)
        assert torch.equal(shared, outputs[:, starts[-1] :])
        first.end(other, *other.chain[hit:])


def telling_prefill(query, key, value, spans, scale, output):
    """Attention that also says the log-sum-exp of its scores, as flash-attention does."""
    torch_prefill(query, key, value, spans, scale, output)
    found = []
    for q, k in zip(query.split(spans.num_queries), key.split(spans.num_keys), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(GROUP, 1)) * scale
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        found.append(scores.masked_fill(~seen, float("-inf")).logsumexp(-1))
    return torch.cat(found, 1)


@pytest.mark.parametrize("ends", [[(33, 20), (75, 60)], [(75, 60)], [(10, 10), (15, 40), (75, 60)]])
def test_what_attention_says_is_what_scoring_would_find(kernels, ends):
    """Of two requests in the same steps, whose scoring queries may come in several of them."""
    lengths, sequences, counts, outputs = ends[-1], [vectors(PROMPT, s) for s in range(2)], [], []
    for prefill in (torch_prefill, telling_prefill):
        cache = make_cache("k8v4-k4v2", kernels, drops=False, rotate="hadamard", prefill=prefill)
        free, starts, attended = list(range(2, NUM_SLOTS)), [0, 0], []
        for slot, length in enumerate(lengths):
            cache.open(slot, length, Thresholds(3, 0))
        before = (0, 0)
        for step_ends in ends:
            chunks, row = [], 0
            for slot, (first, end) in enumerate(zip(before, step_ends, strict=True)):
                rows = cache.ends(slot).up_to(starts[slot], end)
                span, closing = slice(row, row + end - first), tuple(free.pop(0) for _ in rows)
                if end > first:
                    chunks.append(PromptChunk(slot, span, first, lengths[slot], closing))
                starts[slot], row = [starts[slot], *rows][-1], row + end - first
            step = cache.plan(chunks, NOBODY.long(), NOBODY, NOBODY)
            places = [slice(*each) for each in zip(before, step_ends, strict=True)]
            for layer in range(NUM_LAYERS):
                batch = [
                    torch.cat([s[i][layer, p] for s, p in zip(sequences, places, strict=True)])
                    for i in range(3)
                ]
                attended.append(torch.empty_like(batch[0]))
                cache.attend(layer, step, *batch, attended[-1])
            before = step_ends
        counts.append(cache.state.num_tokens.clone())
        outputs.append(torch.cat(attended))
    assert torch.equal(*counts) and 0 < counts[0][..., 1].sum() < counts[0].sum()
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_closed_rows_stay_as_they_are(kernels):
    sequence = vectors(PROMPT + NEW)
    run = Run(make_cache("k8v4-k4v2", kernels, drops=True))
    _, request = run.whole(sequence, [PROMPT], Thresholds(3, 0.5))
    contents = pool.contents(run.cache.state)
    for _ in range(2):
        chain, starts = request.chain[:3], request.starts[:4]
        _, other = run.whole(sequence, [PROMPT], Thresholds(3, 0.5), chain, starts)
        run.end(other, *other.chain[3:])
    after = pool.contents(run.cache.state)
    assert torch.equal(contents["page_ids"].sort().values, after["page_ids"].sort().values)
    assert torch.equal(contents["num_tokens"], after["num_tokens"])
    assert torch.equal(contents["pages"], after["pages"])


def test_a_common_part_of_keys_is_nothing(kernels):
    """Attention does not see a vector that is added to all keys, and neither does the cache."""
    errors = []
    for common in (0.0, 100.0):
        sequence = vectors(PROMPT + NEW, common=common)
        run = Run(make_cache("k4v4", kernels))
        outputs, _ = run.whole(sequence, [20, PROMPT], ALL_HIGH)
        errors.append(float((outputs - exact(sequence)).abs().mean()))
    assert errors[1] < 1.2 * errors[0]


def test_an_open_row_may_begin_empty(kernels):
    """A prompt that ends with its segment, where tokens may be dropped, though none is here: what is
    generated has the centre of the row before."""
    sequence = vectors(4 * SEGMENT + NEW, common=100.0)
    run = Run(make_cache("k8v8", kernels, drops=True))
    outputs, request = run.whole(sequence, [4 * SEGMENT], Thresholds(1e-9, 1e-9))
    assert len(request.chain) == 4
    torch.testing.assert_close(outputs, exact(sequence), atol=0.1, rtol=0.1)


def test_rows_end_at_fixed_positions():
    ends = RowEnds(1024, 4000)
    assert ends.after(0) == ends.after(400) == 1024
    assert ends.after(600) == ends.after(1024) == 2048
    assert RowEnds(1, 4).up_to(0, 4) == [1, 2, 3]
    assert RowEnds(0, 4000).after(0) is None
    assert longest_row(1024) == 1536
    assert ends.cuts(0, 0, 2100) == [(0, 1024, True), (1024, 2048, True), (2048, 2100, False)]
    assert ends.cuts(1024, 1500, 2048) == [(1500, 2048, True)]
    assert ends.cuts(700, 700, 1500) == [(700, 1500, False)]
    assert RowEnds(0, 5000).cuts(0, 10, 5000) == [(10, 5000, False)]


def test_the_rest_of_a_prompt_is_a_row_where_it_is_worth_one():
    """It ends before the last token, so that the same prompt finds it, and at a multiple of 16."""
    rests = [RowEnds(1024, length).after(0) for length in (128, 129, 144, 145)]
    assert rests == [None, 128, 128, 144]
    assert RowEnds(1024, 720).after(586) is None
    assert RowEnds(1024, 721).after(586) == 720
    assert RowEnds(1024, 650).after(640) is None
    ends = RowEnds(1024, 2500)
    assert ends.cuts(0, 0, 2500)[2:] == [(2048, 2496, True), (2496, 2500, False)]
    assert ends.cuts(1024, 1500, 2490) == [(1500, 2048, True), (2048, 2490, False)]
    assert ends.cuts(2048, 2490, 2500) == [(2490, 2496, True), (2496, 2500, False)]


def test_the_first_message_is_a_row_where_it_is_worth_one():
    end = {2, 7}
    text = [1, *[5] * 9, 2, *[5] * 600, 7, *[5] * 40, 2, *[5] * 500]
    assert first_message(text, end, 1024) == 612  # the first one has no eighth of a segment
    assert first_message(text, end, 64) == 11
    assert first_message(text[:611], end, 1024) == first_message(text, end, 0) == 0
    assert RowEnds(1024, 2048).up_to(0, 2048) == [1024, 2032], "the last token is computed anew"
    assert RowEnds(1024, 2048, drops=True).up_to(0, 2048) == [1024, 2048]
    assert RowEnds(1024, 1153, 612, drops=True).up_to(0, 1153) == [1024], "segments only"
    ends = RowEnds(1024, 1153, 612)
    assert ends.up_to(0, 1153) == [612, 1152]
    assert RowEnds(1024, 3000, 612).up_to(0, 3000) == [612, 2048, 2992]
    assert RowEnds(1024, 3000, 1100).up_to(0, 3000) == [1024, 2048, 2992]
    assert RowEnds(1024, 3000, 1500).up_to(0, 3000) == [1024, 1500, 2048, 2992]
    assert RowEnds(1024, 612, 612).up_to(0, 612) == [608]
    assert RowEnds(1024, 613, 612).up_to(0, 613) == [612]


def test_a_prompt_has_not_more_rows_than_there_is_room_for():
    for length in range(1, 5000, 13):
        for message in range(0, length, 37):
            rows = RowEnds(1024, length, message).up_to(0, length)
            assert len(rows) <= most_rows(length, 1024), (length, message)


def test_rows_must_have_slots():
    run = Run(make_cache("k8v4", "reference"))
    run.open(PROMPT, ALL_HIGH)
    with pytest.raises(ValueError, match="not as many"):
        run.cache.plan([PromptChunk(0, slice(0, 20), 0, PROMPT)], NOBODY, NOBODY, NOBODY)


def test_a_life_of_shared_rows(kernels):
    """Requests branch off one another, continue ended ones, are cut off and come back, all exact."""
    rnd, run = random.Random(1), Run(make_cache("k16v16", kernels))
    roots = [vectors(MAX_MODEL_LEN, seed) for seed in range(2)]
    known = []  # (root, chain, starts) of closed rows that are kept
    users = []  # (root, request)
    for _ in range(60 if kernels else 400):
        if len(run.free) < 8 or len(users) > 3:
            root, request = users.pop(rnd.randrange(len(users)))
            keeps = request.num_tokens >= request.prompt_len and rnd.random() < 0.5
            if keeps and request.num_tokens > request.starts[-1]:
                run.cache.end([request.slot])
                run.requests.remove(request)
                rows = (*request.chain, request.slot), (*request.starts, request.num_tokens)
                known.append((root, *rows))
            else:
                known.append((root, request.chain, request.starts))
                run.end(request)
            if len(run.free) < 12:
                used = {slot for _, each in users for slot in each.chain}
                held = {slot for _, chain, _ in known for slot in chain}
                known = []
                run.cache.release(sorted(held - used))
                run.free += sorted(held - used)
        elif not users or rnd.random() < 0.3:
            root, chain, starts = rnd.choice([*known, (rnd.randrange(2), (), (0,))])
            hit = rnd.randint(0, len(chain))
            start = starts[hit]
            prompt_len = rnd.randint(start + 1, MAX_MODEL_LEN - 8) if start < 80 else start + 1
            request = run.open(prompt_len, ALL_HIGH, chain[:hit], starts[: hit + 1])
            users.append((root, request))
        else:
            root, request = rnd.choice(users)
            first = request.num_tokens
            if first < request.prompt_len:
                got = run.prefill(request, rnd.randint(first + 1, request.prompt_len), roots[root])
            elif first < MAX_MODEL_LEN:
                got = run.decode(request, roots[root])
            else:
                continue
            wanted = exact([x[:, : request.num_tokens] for x in roots[root]])[:, first:]
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_a_row_is_found_in_the_step_that_closes_it(kernels, order, drops):
    """The second goes on from rows that the first closes in the same step, the third from both's."""
    thresholds = Thresholds(3.0, 0.3 if drops else 0.0)
    sequences = [vectors(75, 1), vectors(60, 2), vectors(70, 3)]
    for mine, other, shared in ((1, 0, 32), (2, 1, 48)):
        for x, y in zip(sequences[mine], sequences[other], strict=True):
            x[:, :shared] = y[:, :shared]
    shares = {0: (None, 0), 1: (0, 2), 2: (1, 3)}  # whose rows, and how many
    found = []
    for together in (False, True):
        run = Run(make_cache("k8v4-k4v2", kernels, drops=drops))
        requests, chunks, steps = {}, {}, []
        for number in range(3):
            other, num = shares[number]
            chain, starts = (), (0,)
            if other is not None:
                chain, starts = requests[other].chain[:num], requests[other].starts[: num + 1]
            length = sequences[number][0].shape[1]
            request = requests[number] = run.open(length, thresholds, chain, starts)
            chunks[number] = run.chunk(request, length)
        for numbers in [order] if together else [[0], [1], [2]]:
            row, placed = 0, []
            for number in numbers:
                chunk = chunks[number]
                span = slice(row, row + chunk.num_new)
                placed.append(dataclasses.replace(chunk, span=span))
                row = span.stop
            step = run.cache.plan(placed, NOBODY.long(), NOBODY, NOBODY)
            parts = [[x[:, chunks[n].num_stored :] for x in sequences[n]] for n in numbers]
            joint = [torch.cat(xs, 1) for xs in zip(*parts, strict=True)]
            outputs = run.attend(step, joint, 0, row)
            lengths = [chunk.num_new for chunk in placed]
            steps += zip(numbers, outputs.split(lengths, 1), strict=True)
        found.append((dict(steps), run.cache.state.num_tokens.clone()))
    for number in range(3):
        torch.testing.assert_close(*(each[number] for each, _ in found), atol=1e-5, rtol=1e-5)
    assert torch.equal(*(kept for _, kept in found))


@pytest.mark.parametrize("drops", [False, True])
def test_prompts_that_see_much_attend_in_turns(monkeypatch, kernels, drops):
    """Three that go on in one step: the same outputs and rows whether together or one by one."""
    thresholds = Thresholds(3.0, 0.3 if drops else 0.0)
    lengths, halves = (75, 60, 48), (40, 16, 33)
    found = []
    for most in (chains.SEEN_BYTES, 1):
        monkeypatch.setattr(chains, "SEEN_BYTES", most)
        run = Run(make_cache("k8v4-k4v2", kernels, drops=drops))
        sequences = [vectors(length, seed) for seed, length in enumerate(lengths)]
        requests = [run.open(length, thresholds) for length in lengths]
        for request, half, sequence in zip(requests, halves, sequences, strict=True):
            run.prefill(request, half, sequence)
        parts, row, step_chunks = [], 0, []
        for request, half, sequence in zip(requests, halves, sequences, strict=True):
            step_chunks.append(run.chunk(request, request.prompt_len, row))
            parts.append([x[:, half:] for x in sequence])
            row = step_chunks[-1].span.stop
        step = run.cache.plan(step_chunks, NOBODY.long(), NOBODY, NOBODY)
        assert len(step.prompts.waves) > len(requests) or most > 1
        joint = [torch.cat(xs, 1) for xs in zip(*parts, strict=True)]
        found.append((run.attend(step, joint, 0, row), run.cache.state.num_tokens.clone()))
    torch.testing.assert_close(*(outputs for outputs, _ in found), atol=1e-5, rtol=1e-5)
    assert torch.equal(*(kept for _, kept in found))
