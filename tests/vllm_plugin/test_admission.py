"""Requests are admitted by their expected size; if that is wrong, nothing is lost, leaked or overrun."""

import math

import pytest
from conftest import NEW_TOKENS, engine, random_prompts
from small_pool import make_shape
from stepping import Request, check_empty, check_quotas, drive

from diffkv.policy import Thresholds
from diffkv.vllm_plugin.scheduler.estimate import FEWEST_SEEN, MARGIN, MOST_KINDS, SEEN, RowSizes

EXACT, NOTHING_DROPPED = "k16v16", {"alpha_low": 1e-30, "segment": 128}
"""Prompts are scored, but nothing is lost: every token must be right."""
TIGHT_BYTES = 14 << 20
LOSSY = {"alpha_high": 3, "alpha_low": 1}


class TestRowSizes:
    length, thresholds = 900, Thresholds(3, 0)

    def learned(self, *shares: float, worst: bool = False) -> RowSizes:
        sizes = RowSizes(make_shape(), worst)
        for share in shares:
            num_pages = round(share * sizes.most(self.length))
            sizes.observe(self.thresholds, self.length, num_pages)
        return sizes

    def expected(self, sizes: RowSizes) -> float:
        return sizes.expected(self.thresholds, self.length) / sizes.most(self.length)

    def test_a_quarter_high_until_enough_are_seen(self) -> None:
        unknown = self.expected(self.learned())
        assert self.expected(self.learned(*[0.2] * (FEWEST_SEEN - 1))) == unknown
        assert 0.2 < unknown < 1
        learned = self.expected(self.learned(*[0.2] * FEWEST_SEEN))
        assert learned == pytest.approx(0.2 * MARGIN, abs=0.01)

    def test_largest_of_the_latest_with_a_margin(self) -> None:
        sizes = self.learned(*[0.3] * FEWEST_SEEN, 0.5, *[0.3] * (SEEN - 1))
        assert self.expected(sizes) == pytest.approx(0.5 * MARGIN, abs=0.01)
        sizes.observe(self.thresholds, self.length, round(0.3 * sizes.most(self.length)))
        assert self.expected(sizes) == pytest.approx(0.3 * MARGIN, abs=0.01)
        assert self.expected(self.learned(*[0.95] * FEWEST_SEEN)) == 1

    def test_worst_case_where_it_is_asked_for_or_certain(self) -> None:
        assert self.expected(self.learned(*[0.2] * SEEN, worst=True)) == 1
        sizes = self.learned(*[0.2] * SEEN)
        assert sizes.expected(Thresholds(), 900) == sizes.most(900)

    def test_other_settings_and_lengths_are_not_judged_by_it(self) -> None:
        sizes, unknown = self.learned(*[0.1] * SEEN), self.learned()
        for thresholds, length in ((Thresholds(3, 0.1), 900), (self.thresholds, 90)):
            assert sizes.expected(thresholds, length) == unknown.expected(thresholds, length)

    def test_memory_is_bounded(self) -> None:
        sizes = self.learned()
        for i in range(2 * MOST_KINDS):
            sizes.observe(Thresholds(i, 0), 900, 1)
        assert len(sizes._seen) == MOST_KINDS


@pytest.mark.parametrize("batched_tokens", [4096, 640], ids=["whole prompts", "some in chunks"])
def test_tokens_equal_stock_when_expectations_are_wrong(
    monkeypatch: pytest.MonkeyPatch,
    batched_tokens: int,
    prompts: list[list[int]],
    stock: list[list[int]],
) -> None:
    """Every row is taken for an eighth of what it may need: more are admitted than there is room for."""

    def an_eighth(self: RowSizes, thresholds: Thresholds, num_tokens: int) -> int:
        return math.ceil(self.most(num_tokens) / 8)

    monkeypatch.setattr(RowSizes, "expected", an_eighth)
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
        check_empty(llm)


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
            check_empty(llm)
            peaks[admission] = driven.running_peak
    assert peaks["expected"] > peaks["worst-case"]
