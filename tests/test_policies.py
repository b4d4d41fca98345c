"""The baselines keep as many tokens as they say, and those that they say."""

import pytest
import torch

from diffkv import policies
from diffkv.lab.evaluation import baselines
from diffkv.policy import DROPPED, HIGH, LOW, WINDOW, Thresholds, paper_tiers
from diffkv.quant import ConfigError, QuantConfig

NUM_HEADS, NUM_TOKENS = 4, 400
MEANS = torch.rand(NUM_HEADS, NUM_TOKENS, generator=torch.Generator().manual_seed(0))
MEANS[:, :3] = 1e-3  # sinks that scores alone would drop
BUDGET = 100


def tiers(text, means=MEANS, thresholds=None):
    return baselines.parse(text).tiers(means, thresholds or Thresholds(), WINDOW)


def counts(result):
    return [[int((row == tier).sum()) for tier in (HIGH, LOW, DROPPED)] for row in result]


@pytest.mark.parametrize("name", ["window", "topk", "topk-uniform", "random"])
def test_every_head_keeps_its_budget_and_the_window(name):
    result = tiers(f"{name}:keep=0.25")
    assert counts(result) == [[BUDGET, 0, NUM_TOKENS - BUDGET]] * NUM_HEADS
    assert (result[:, -WINDOW:] == HIGH).all()


def test_low_survivors_leave_the_window_high():
    expected = [[WINDOW, BUDGET - WINDOW, NUM_TOKENS - BUDGET]] * NUM_HEADS
    assert counts(tiers("topk:keep=0.25,survivors=low")) == expected


@pytest.mark.parametrize("name", ["window", "topk", "topk-uniform", "topk-adaptive", "random"])
def test_sinks_stay_within_the_budget(name):
    result = tiers(f"{name}:keep=0.25,sinks=3")
    assert (result[:, :3] == HIGH).all()
    assert int((result == HIGH).sum()) == NUM_HEADS * BUDGET


def test_topk_keeps_the_largest_of_each_head():
    result = tiers("topk:keep=0.25")[:, :-WINDOW]
    for row, means in zip(result, MEANS[:, :-WINDOW], strict=True):
        assert means[row == HIGH].min() > means[row == DROPPED].max()


def test_uniform_heads_agree_and_adaptive_heads_compete():
    uniform = tiers("topk-uniform:keep=0.25")
    assert (uniform == uniform[0]).all()
    loud = MEANS.clone()
    loud[0] += 1
    adaptive = [row[0] for row in counts(tiers("topk-adaptive:keep=0.25", loud))]
    assert adaptive == [WINDOW + NUM_HEADS * (BUDGET - WINDOW), WINDOW, WINDOW, WINDOW]


def test_window_keeps_the_latest():
    result = tiers("window:keep=0.25,sinks=4")
    kept = (result[0] == HIGH).nonzero().flatten().tolist()
    assert kept == [*range(4), *range(NUM_TOKENS - BUDGET + 4, NUM_TOKENS)]


def test_random_follows_its_seed():
    first, second = (tiers("random:keep=0.25,seed=1") for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, tiers("random:keep=0.25,seed=2"))
    policy = baselines.parse("random:keep=0.25,seed=1")
    drawn = [policy.tiers(MEANS, Thresholds(), WINDOW) for _ in range(2)]
    assert torch.equal(drawn[0], first) and not torch.equal(drawn[1], first)


def test_one_budget_spends_what_the_rule_spends():
    thresholds = Thresholds(300.0, 80.0)
    skewed = MEANS * torch.tensor([0.2, 0.6, 1.0, 1.4])[:, None]
    published = torch.tensor(counts(paper_tiers(skewed, thresholds, WINDOW)))
    uniform = torch.tensor(counts(tiers("paper-uniform", skewed, thresholds)))
    assert (uniform == uniform[0]).all() and not (published == published[0]).all()
    assert (uniform.sum(0) - published.sum(0)).abs().max() <= 2 * NUM_HEADS


class TestDistinct:
    """`paper:distinct=…` drops low tokens whose keys are most alike."""

    KEYS = torch.randn(NUM_TOKENS, NUM_HEADS, 16, generator=torch.Generator().manual_seed(1))
    KEYS[100:200] = KEYS[100] + 0.01 * KEYS[100:200]  # a hundred of one direction
    BEFORE = NUM_TOKENS - WINDOW
    LOW_ALL = Thresholds(2.0 * NUM_TOKENS, 0.0)

    def decide(self, text, thresholds=LOW_ALL):
        return policies.parse(text).decide(MEANS, self.KEYS, thresholds, WINDOW)

    def test_what_is_alike_goes_first(self):
        result = self.decide("paper:distinct=0.75")
        num_dropped = self.BEFORE - round(0.75 * self.BEFORE)
        assert counts(result) == [[WINDOW, self.BEFORE - num_dropped, num_dropped]] * NUM_HEADS
        assert (result[:, 100:200] == DROPPED).sum() == NUM_HEADS * num_dropped

    def test_what_is_high_stays(self):
        thresholds = Thresholds(0.5 * NUM_TOKENS, 0.0)
        published = self.decide("paper", thresholds)
        result = self.decide("paper:distinct=0.5", thresholds)
        assert torch.equal(result == HIGH, published == HIGH)
        assert (result == DROPPED).any() and not (published == DROPPED).any()

    def test_all_or_nothing(self):
        assert torch.equal(self.decide("paper:distinct=1"), self.decide("paper"))
        assert (self.decide("paper:distinct=0")[:, : self.BEFORE] == DROPPED).all()

    def test_a_request_that_is_off_keeps_all(self):
        assert not policies.parse("paper:distinct=0.5").decides(Thresholds())

    def test_needs_a_low_tier(self):
        with pytest.raises(ConfigError, match="has no low tier"):
            policies.parse("paper:distinct=0.5").check(QuantConfig.parse("k8v4"))


def test_short_prompts_stay_whole():
    for name in baselines.ALL_POLICIES:
        assert (tiers(name, MEANS[:, :WINDOW]) == HIGH).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snapkv", "there are paper, paper-uniform, none, window, topk"),
        ("topk:keep=1.5", "0 .. 1"),
        ("paper:distinct=75", "distinct must be a share of 0 .. 1, got '75'"),
        ("topk:budget=5", "settings: keep, sinks, survivors, queries"),
        ("none:keep=0.5", "settings: none"),
        ("random:seed=-1", "at least 0"),
        ("topk:queries=0", "or all"),
        ("topk:survivors=medium", "high or low"),
        ("topk:keep=0.5,keep=0.6", "once each"),
    ],
)
def test_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        baselines.parse(text)


def test_the_core_has_what_an_engine_runs():
    assert all(policies.parse(name).uses_thresholds for name in policies.POLICIES)
    with pytest.raises(
        ConfigError, match=r"unknown policy 'topk': there are paper, paper-uniform$"
    ):
        policies.parse("topk")


def test_low_survivors_need_a_low_tier():
    with pytest.raises(ConfigError, match="k8v4-k4v2"):
        baselines.parse("topk:survivors=low").check(QuantConfig.parse("k8v4"))
