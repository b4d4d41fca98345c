"""Rows that requests share: tokens are right, hits are counted, nothing leaks."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import engine, metric
from stepping import (
    Request,
    blocks_in_use,
    check_empty,
    check_idle,
    check_quotas,
    drive,
    scheduler,
    worker,
)
from vllm import SamplingParams

from diffkv.shape import PoolShape
from diffkv.vllm_plugin.options import Options

SEGMENT = 128
EXACT = {"segment": SEGMENT}
COMPRESSED = {"segment": SEGMENT, "alpha_high": 3}
MESSAGE_END = 2
NUM_CONVERSATIONS, NUM_TURNS, NEW_TOKENS = 5, 3, 20


def words(num: int, seed: int) -> list[int]:
    rnd = random.Random(seed)
    return [rnd.randrange(10, 400) for _ in range(num)]


def conversations(llm: Any, after_step: Any = None) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Answers by turn, and the tokens that were found of each prompt.

    All begin with the same 300 tokens; half of them branch off another one after its first turn.
    """
    shared = [1, *words(299, 0)]
    texts = {f"c{i}": shared + words(10 + 17 * i, 1 + i) for i in range(NUM_CONVERSATIONS)}
    answers, found = [], []
    for turn in range(NUM_TURNS):
        requests = {name: Request(text, NEW_TOKENS) for name, text in texts.items()}
        driven = drive(llm, requests, after_step)
        answers.append(driven.token_ids)
        found += driven.num_cached.values()
        for i, name in enumerate(texts):
            texts[name] = texts[name] + driven.token_ids[name] + words(15, 100 * turn + i)
        if turn == 0:
            texts |= {f"b{i}": texts[f"c{i}"][:-5] + words(9, 50 + i) for i in range(2)}
    return answers, found


@pytest.fixture(scope="module")
def stock_conversations() -> list[dict[str, list[int]]]:
    with engine(max_model_len=1024) as llm:
        return conversations(llm)[0]


@pytest.mark.parametrize(
    ("arguments", "preempts"),
    [
        pytest.param({}, False, id="whole prompts"),
        pytest.param({"max_num_batched_tokens": 96}, False, id="chunks"),
        pytest.param(
            {"kv_cache_memory_bytes": 9 << 20, "watermark": 0.0}, True, id="little memory"
        ),
    ],
)
def test_turns_and_branches_equal_stock(
    arguments: dict[str, Any],
    preempts: bool,
    stock_conversations: list[dict[str, list[int]]],
) -> None:
    with engine("k16v16", EXACT, max_model_len=1024, **arguments) as llm:
        answers, found = conversations(llm, lambda step: check_quotas(llm))
        assert answers == stock_conversations
        assert max(found) > 300
        if not preempts:
            hits = metric(llm, "vllm:prefix_cache_hits")
            assert hits == sum(found) > 0
            assert metric(llm, "vllm:prefix_cache_queries") > hits
        check_idle(llm)
        assert worker()._rows.lengths
        check_empty(llm)


def ask(llm: Any, text: list[int], **request: Any) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were found."""
    driven = drive(
        llm, {"one": Request(text, NEW_TOKENS, **request)}, lambda step: check_quotas(llm)
    )
    return driven.token_ids["one"], driven.num_cached["one"]


class TestRowsShorterThanBlocks:
    """Of tokens that vLLM hashes together; rows may end anywhere."""

    BLOCK = 128

    @pytest.fixture(scope="class")
    def llm(self) -> Iterator[Any]:
        options = {"segment": 64, "alpha_high": 3}
        with engine("k8v4-k4v2", options, max_model_len=1024, block_size=self.BLOCK) as llm:
            yield llm

    @pytest.mark.parametrize("length", [9, 70, 130, 300])
    def test_a_prompt_and_the_next_turn_hit(self, llm: Any, length: int) -> None:
        text = [1, *words(length, length)]
        assert llm.reset_prefix_cache()
        right, found = ask(llm, text)
        assert found == 0
        assert ask(llm, text) == (right, length // 16 * 16 if length >= 16 else 0)
        turn = [*text, *right, 11, 12]
        assert ask(llm, turn)[1] == len(text) + len(right) - 1
        check_idle(llm)

    def test_a_short_first_message(self, llm: Any) -> None:
        system = [1, *words(70, 21), MESSAGE_END]
        assert llm.reset_prefix_cache()
        assert ask(llm, [*system, *words(40, 22)])[1] == 0
        text = [*system, *words(40, 23)]
        right, found = ask(llm, text)
        assert found == len(system)
        assert llm.reset_prefix_cache()
        assert ask(llm, text) == (right, 0)

    def test_salts_share_nothing(self, llm: Any) -> None:
        text = [1, *words(100, 24)]
        right, _ = ask(llm, text, cache_salt="a")
        assert ask(llm, text, cache_salt="b") == (right, 0)
        assert ask(llm, text, cache_salt="a") == (right, 96)


class TestCompressed:
    @pytest.fixture(scope="class")
    def llm(self) -> Iterator[Any]:
        with engine("k8v4-k4v2", COMPRESSED, max_model_len=1024, max_num_batched_tokens=512) as llm:
            yield llm

    def test_a_hit_changes_no_token(self, llm: Any) -> None:
        text = [1, *words(700, 3)]
        assert llm.reset_prefix_cache()
        first = ask(llm, text)
        assert first[1] == 0
        assert ask(llm, text) == (first[0], 688)  # whole blocks of 16 before the last token
        assert llm.reset_prefix_cache()
        assert ask(llm, text) == first
        check_idle(llm)

    def test_a_turn_goes_on_from_all_that_was_stored(self, llm: Any) -> None:
        text = [1, *words(333, 4)]
        answer, _ = ask(llm, text)
        stored = len(text) + len(answer) - 1  # the last token was sampled and not stored
        assert ask(llm, [*text, *answer, 11])[1] == stored
        # as if a stop string had been cut off, or the text tokenised differently
        for again in (answer[:-3], answer[1:], []):
            assert ask(llm, [*text, *again, 12, 13, 14])[1] == 320

    def test_chats_over_one_system_message(self, llm: Any) -> None:
        """It ends where no segment does: the model's end-of-sequence token tells where."""
        system = [1, *words(300, 11), MESSAGE_END]
        assert ask(llm, [*system, *words(40, 12)])[1] == 0
        text = [*system, *words(40, 13)]
        right, found = ask(llm, text)
        assert found == len(system)
        assert llm.reset_prefix_cache()
        assert ask(llm, text) == (right, 0)

    def test_two_requests_go_on_from_one_row(self, llm: Any) -> None:
        text = [1, *words(300, 5)]
        answer, _ = ask(llm, text)
        turns = {f"t{i}": Request([*text, *answer, 20 + i], NEW_TOKENS) for i in range(3)}
        driven = drive(llm, turns, lambda step: check_quotas(llm))
        assert set(driven.num_cached.values()) == {len(text) + len(answer) - 1}
        check_idle(llm)

    def test_a_prompt_is_computed_once_and_paid_once(self, llm: Any) -> None:
        """Requests that come together wait for the first of them."""
        text, peak = [1, *words(511, 6)], 0

        def look(step: int) -> None:
            nonlocal peak
            check_quotas(llm)
            peak = max(peak, blocks_in_use(llm))

        drive(llm, {"one": Request([*text, 11], 2)}, look)
        alone, peak = peak, 0
        assert llm.reset_prefix_cache()
        before = metric(llm, "vllm:prefix_cache_hits")
        fleet = {f"f{i}": Request([*text, 30 + i], 2) for i in range(8)}
        driven = drive(llm, fleet, look)
        assert sorted(driven.num_cached.values()) == [0] + [512] * 7
        assert metric(llm, "vllm:prefix_cache_hits") - before == 7 * 512
        assert peak < 2.5 * alone
        assert driven.running_peak == 8

    @pytest.mark.parametrize(
        "other",
        [
            {"extra_args": {"diffkv_alpha_high": 1.0}},
            {"extra_args": {"diffkv": "off"}},
            {"cache_salt": "mine"},
        ],
        ids=str,
    )
    def test_requests_unlike_each_other_share_nothing(self, llm: Any, other: Any) -> None:
        text = [1, *words(400, 7)]
        ask(llm, text)
        assert llm.reset_prefix_cache()
        ask(llm, text)
        answer, found = ask(llm, text, **other)
        assert found == 0
        assert ask(llm, text, **other) == (answer, 400)
        assert ask(llm, text)[1] == 400

    def test_several_answers_to_one_prompt(self, llm: Any) -> None:
        from vllm import SamplingParams

        text = [1, *words(400, 8)]
        params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)
        assert len(output.outputs) == 3
        ask(llm, [1, 2, 3])
        check_idle(llm)

    def test_aborted_requests_leave_what_is_right(self, llm: Any) -> None:
        text, seen = [1, *words(600, 9)], []
        assert llm.reset_prefix_cache()

        def abort(step: int) -> None:
            running = scheduler(llm).running
            if running and running[0].num_computed_tokens >= 512 and not seen:
                llm.llm_engine.abort_request(["one"])
                seen.append(step)

        drive(llm, {"one": Request(text, 50)}, abort)
        assert seen
        check_idle(llm)
        right, found = ask(llm, text)
        assert found == 512
        assert llm.reset_prefix_cache()
        assert ask(llm, text) == (right, 0)


def test_nothing_is_kept_without_prefix_caching() -> None:
    with engine("k8v4-k4v2", COMPRESSED, max_model_len=1024, enable_prefix_caching=False) as llm:
        text = [1, *words(600, 3)]
        first = ask(llm, text)
        assert ask(llm, text) == first
        check_idle(llm)
        assert worker().accounts.num_held == 0


class TestLongPrompts:
    @pytest.fixture(scope="class")
    def small(self) -> Iterator[Any]:
        """A pool that holds a prompt only if it is compressed."""
        longest, requests = 4096, 4
        layout = Options(quant="k8v8-k4v1").layout(64, 4)
        with engine(
            "k8v8-k4v1",
            COMPRESSED,
            max_model_len=longest,
            max_num_seqs=requests,
            max_num_batched_tokens=128,
            kv_cache_memory_bytes=PoolShape.least_budget(layout, 3, 2, longest, requests, SEGMENT),
            watermark=0.0,
        ) as llm:
            yield llm

    def test_twice_what_the_pool_could_hold_uncompressed(self, small: Any) -> None:
        shape = worker().shape
        exact = shape.num_pages / shape.num_heads * shape.layout.exact().high.tokens_per_page
        text = [1, *words(int(2 * exact), 1)]
        answer, _ = ask(small, text)
        assert len(answer) == NEW_TOKENS
        check_idle(small)

    def test_rows_nobody_uses_make_room(self, small: Any) -> None:
        """More texts than the pool holds: each is answered, and the oldest are given up first."""
        texts = [[1, *words(1500, 20 + i)] for i in range(6)]
        for text in texts:
            ask(small, text)
        check_idle(small)
        found = [ask(small, text)[1] for text in (texts[-1], texts[0])]
        assert found[0] > found[1] == 0

    def test_one_that_is_too_large_ends_alone(self, small: Any) -> None:
        """All of its tokens stay high, and the pool does not hold them."""
        requests = {
            "large": Request([1, *words(4000, 2)], NEW_TOKENS, {"diffkv": "off"}),
            "small": Request([1, *words(50, 3)], NEW_TOKENS),
        }
        driven = drive(small, requests, lambda step: None)
        assert len(driven.token_ids["small"]) == NEW_TOKENS
        assert driven.finish_reason["large"] == "error"
        check_empty(small)


def test_a_prompt_that_is_too_large_for_its_only_step_samples_the_right_token() -> None:
    """vLLM ends it with its second step, so one of a single token is answered."""
    longest, requests = 4096, 4
    text = [1, *words(4000, 2)]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    args = {"max_model_len": longest, "max_num_seqs": requests, "enable_chunked_prefill": False}
    layout = Options(quant="k8v8-k4v1").layout(64, 4)
    budget = PoolShape.least_budget(layout, 3, 2, longest, requests, SEGMENT)
    ours = {"kv_cache_memory_bytes": budget, "watermark": 0.0}
    with engine(**args) as llm:
        (stock,) = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)
    with engine("k8v8-k4v1", COMPRESSED, **ours, **args) as llm:
        driven = drive(llm, {"one": Request(text, 1)}, lambda step: None)
        assert driven.token_ids["one"] == list(stock.outputs[0].token_ids)
        check_idle(llm)
