"""Prompts are admitted by their expected size; where it is wrong, nothing is lost, leaked or overrun."""

import math

import pytest
from conftest import NEW_TOKENS, engine, metric, random_prompts
from stepping import Request, check_empty, check_quotas, drive

from diffkv.layout import PageLayout
from diffkv.policy import Thresholds
from diffkv.quant import QuantConfig
from diffkv.shape import HIGH_SHARE, PoolShape
from diffkv.vllm_plugin.scheduler.estimate import FEWEST_SEEN, MARGIN, MOST_KINDS, SEEN, RowSizes

DEFAULT = Thresholds(3, 0)
LAYOUT = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), 8, 256, 4)
SHAPE = PoolShape(LAYOUT, 2, 2, 16, 1024, 1000)

EXACT, NOTHING_DROPPED = "k16v16", {"alpha_low": 1e-30, "segment": 128}
"""Prompts are scored and preempted, but nothing is lost: every token must be right."""
TIGHT_BYTES = 14 << 20
LOSSY = {"alpha_high": 3, "alpha_low": 1, "window": 8, "segment": 128}


class TestRowSizes:
    most = RowSizes(SHAPE, worst=False).most(900)

    def learned(self, *shares: float) -> RowSizes:
        sizes = RowSizes(SHAPE, worst=False)
        for share in shares:
            sizes.observe(DEFAULT, 900, round(share * self.most))
        return sizes

    def test_a_share_is_assumed_until_enough_are_seen(self) -> None:
        high, low = LAYOUT.tiers
        assumed = SHAPE.num_heads * (
            math.ceil(900 * HIGH_SHARE / high.tokens_per_page)
            + math.ceil(900 * (1 - HIGH_SHARE) / low.tokens_per_page)
        )
        assert self.learned(*[0.2] * (FEWEST_SEEN - 1)).expected(DEFAULT, 900) == assumed
        learned = self.learned(*[0.2] * FEWEST_SEEN).expected(DEFAULT, 900)
        assert learned == pytest.approx(0.2 * MARGIN * self.most, abs=2) != assumed

    def test_largest_of_the_latest_with_a_margin(self) -> None:
        sizes = self.learned(*[0.3] * FEWEST_SEEN, 0.5, *[0.3] * (SEEN - 1))
        larger, smaller = (pytest.approx(x * MARGIN * self.most, abs=2) for x in (0.5, 0.3))
        assert sizes.expected(DEFAULT, 900) == larger
        sizes.observe(DEFAULT, 900, round(0.3 * self.most))
        assert sizes.expected(DEFAULT, 900) == smaller
        assert self.learned(*[0.95] * FEWEST_SEEN).expected(DEFAULT, 900) == self.most

    @pytest.mark.parametrize(("thresholds", "length"), [(Thresholds(3, 0.1), 900), (DEFAULT, 90)])
    def test_other_settings_and_lengths_are_not_judged_by_it(
        self, thresholds: Thresholds, length: int
    ) -> None:
        unknown = RowSizes(SHAPE, worst=False).expected(thresholds, length)
        assert self.learned(*[0.2] * SEEN).expected(thresholds, length) == unknown

    def test_all_high_and_the_option_are_the_worst_case(self) -> None:
        assert self.learned().expected(Thresholds(), 900) == self.most
        assert RowSizes(SHAPE, worst=True).expected(DEFAULT, 900) == self.most

    def test_memory_is_bounded(self) -> None:
        sizes = RowSizes(SHAPE, worst=False)
        for i in range(2 * MOST_KINDS):
            sizes.observe(Thresholds(i, 0), 900, 100)
        assert len(sizes._seen) == MOST_KINDS


@pytest.fixture
def expects_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is taken for an eighth of what it may need."""

    def an_eighth(self: RowSizes, thresholds: Thresholds, num_tokens: int) -> int:
        return self.most(num_tokens) // 8

    monkeypatch.setattr(RowSizes, "expected", an_eighth)


@pytest.mark.usefixtures("expects_too_little")
@pytest.mark.parametrize("batched_tokens", [4096, 640], ids=["whole prompts", "some in chunks"])
def test_tokens_equal_stock_when_too_many_are_admitted(
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
        assert metric(llm, "vllm:num_preemptions") > 0
        (summary,) = llm.collective_rpc("diffkv_summary")
        assert summary["totals"]["num_requests"] == len(prompts), (
            "those that were preempted are no ends"
        )
        check_empty(llm)


def test_more_run_at_once_than_by_worst_case() -> None:
    """Prompts of 800 tokens of which a pool holds few by worst case."""
    peaks = {}
    prompts = [p for seed in range(2) for p in random_prompts(24, 900, seed) if 512 < len(p) < 800]
    for admission in ("worst-case", "expected"):
        with engine(
            "k8v4-k4v2",
            LOSSY | {"admission": admission},
            max_model_len=1024,
            max_num_batched_tokens=1024,
            kv_cache_memory_bytes=7 << 19,
        ) as llm:
            drive(llm, {f"w{i}": Request(p, 2) for i, p in enumerate(prompts[:FEWEST_SEEN])})
            driven = drive(llm, {f"r{i}": Request(p, 160) for i, p in enumerate(prompts)})
            assert all(len(tokens) == 160 for tokens in driven.token_ids.values())
            check_empty(llm)
            peaks[admission] = driven.running_peak
    assert peaks["expected"] > peaks["worst-case"]
