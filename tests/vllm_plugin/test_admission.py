"""Prompts get quotas of their expected size; where that is wrong, nothing is lost, leaked or overrun."""

import math

import pytest
from checkpoints import make
from conftest import NEW_TOKENS, engine, random_prompts
from stepping import Request, check_empty, check_quotas, drive, manager, worker
from test_models import arguments, decode, token_ids

from diffkv.policy import Thresholds
from diffkv.vllm_plugin.scheduler.estimate import (
    FEWEST_SEEN,
    MARGIN,
    MOST_KINDS,
    SEEN,
    Prompt,
    PromptSizes,
)

EXACT, NOTHING_DROPPED = "k16v16", {"alpha_low": 1e-30}
"""Prompts are scored, held to limits and given up, but nothing is lost: every token must be right."""
TIGHT_BYTES = 14 << 20
LOSSY = {"alpha_high": 3, "alpha_low": 1}


class TestPromptSizes:
    prompt = Prompt(900, Thresholds(3, 0))

    def learned(self, *shares: float) -> PromptSizes:
        sizes = PromptSizes()
        for share in shares:
            sizes.observe(self.prompt, share)
        return sizes

    def test_worst_case_until_enough_are_seen(self) -> None:
        assert self.learned(*[0.2] * (FEWEST_SEEN - 1)).expected(self.prompt, 1000) == 1000
        assert self.learned(*[0.2] * FEWEST_SEEN).expected(self.prompt, 1000) == math.ceil(
            0.2 * MARGIN * 1000
        )

    def test_largest_of_the_latest_with_a_margin(self) -> None:
        sizes = self.learned(*[0.3] * FEWEST_SEEN, 0.5, *[0.3] * (SEEN - 1))
        assert sizes.expected(self.prompt, 1000) == math.ceil(0.5 * MARGIN * 1000)
        sizes.observe(self.prompt, 0.3)
        assert sizes.expected(self.prompt, 1000) == math.ceil(0.3 * MARGIN * 1000)
        assert self.learned(*[0.95] * FEWEST_SEEN).expected(self.prompt, 1000) == 1000

    @pytest.mark.parametrize(
        "other",
        [Prompt(900, Thresholds(3, 0.1)), Prompt(90, Thresholds(3, 0)), Prompt(900, Thresholds())],
    )
    def test_other_settings_and_lengths_are_not_judged_by_it(self, other: Prompt) -> None:
        sizes = self.learned(*[0.2] * SEEN)
        assert sizes.expected(other, 1000) == 1000

    def test_all_high_is_never_a_bet(self) -> None:
        sizes, off = PromptSizes(), Prompt(20, Thresholds())
        for _ in range(SEEN):
            sizes.observe(off, 0.5)
        assert sizes.expected(off, 8) == 8

    def test_memory_is_bounded(self) -> None:
        sizes = PromptSizes()
        for i in range(2 * MOST_KINDS):
            sizes.observe(Prompt(900, Thresholds(i, 0)), 0.5)
        assert len(sizes._seen) == MOST_KINDS


@pytest.fixture
def expects_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt that could be compressed is taken for an eighth of what it may need."""

    def an_eighth(self: PromptSizes, prompt: Prompt, most_pages: int) -> int:
        return most_pages // 8

    monkeypatch.setattr(PromptSizes, "expected", an_eighth)


@pytest.mark.usefixtures("expects_too_little")
@pytest.mark.parametrize("batched_tokens", [4096, 640], ids=["whole prompts", "some in chunks"])
def test_tokens_equal_stock_when_every_bet_is_lost(
    batched_tokens: int, prompts: list[list[int]], stock: list[list[int]]
) -> None:
    with engine(
        EXACT,
        NOTHING_DROPPED,
        max_model_len=1152,
        kv_cache_memory_bytes=TIGHT_BYTES,
        max_num_batched_tokens=batched_tokens,
        watermark=0.0,
    ) as llm:
        requests = {f"r{i}": Request(prompt, NEW_TOKENS) for i, prompt in enumerate(prompts)}
        driven = drive(llm, requests, lambda step: check_quotas(llm))
        assert [driven.token_ids[name] for name in requests] == stock
        assert worker().summary()["totals"]["given_up"] > 0
        check_empty(llm)


@pytest.mark.usefixtures("expects_too_little")
def test_prompts_given_up_on_two_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ranks hold different heads, so one may give up what the other keeps."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = make("llama2", tmp_path_factory.mktemp("llama2"))
    answers, given_up = {}, {}
    for ranks, budget in ((1, 256 << 20), (2, 1_200_000)):
        with engine(
            EXACT,
            NOTHING_DROPPED,
            **arguments(model, tensor_parallel_size=ranks, kv_cache_memory_bytes=budget),
        ) as llm:
            answers[ranks] = token_ids(decode(llm))
            llm.llm_engine.step()
            summaries = llm.collective_rpc("diffkv_summary")
            assert [s["pool"]["pages_held"] for s in summaries] == [0] * ranks
            given_up[ranks] = max(s["totals"]["given_up"] for s in summaries)
    assert answers[1] == answers[2]
    assert given_up[1] == 0 < given_up[2]


def test_more_run_at_once_than_by_worst_case() -> None:
    """Prompts of 900 tokens of which a pool holds two by worst case."""
    peaks = {}
    prompts = [p for seed in range(2) for p in random_prompts(24, 900, seed) if len(p) > 512]
    for admission in ("worst-case", "expected"):
        with engine(
            "k8v4-k4v2",
            LOSSY | {"admission": admission},
            max_model_len=1024,
            max_num_batched_tokens=1024,
            kv_cache_memory_bytes=7 << 18,
        ) as llm:
            drive(llm, {f"w{i}": Request(p, 2) for i, p in enumerate(prompts[:FEWEST_SEEN])})
            driven = drive(llm, {f"r{i}": Request(p, 48) for i, p in enumerate(prompts)})
            assert all(len(tokens) == 48 for tokens in driven.token_ids.values())
            assert not manager(llm)._prompts
            check_empty(llm)
            peaks[admission] = driven.running_peak
    assert peaks["expected"] > peaks["worst-case"]
