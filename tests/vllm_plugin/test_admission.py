"""Prompts get quotas of their expected size; where that is wrong, nothing is lost, leaked or overrun."""

import math

import pytest
from conftest import NEW_TOKENS, engine
from stepping import Request, check_empty, check_quotas, drive, worker

from diffkv.policy import Thresholds
from diffkv.vllm_plugin.estimate import FEWEST_SEEN, MARGIN, MOST_KINDS, SEEN, Prompt, PromptSizes

EXACT, NOTHING_DROPPED = "k16v16", {"alpha_low": 1e-30}
"""Prompts are scored, held to limits and given up, but nothing is lost: every token must be right."""
TIGHT_BYTES = 14 << 20


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
