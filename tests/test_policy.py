"""The rule, case by case, with numbers worked out by hand."""

import math

import pytest
import torch

from diffkv.policy import (
    DROPPED,
    HIGH,
    LOW,
    MOST_ALPHA,
    DecodeAction,
    Thresholds,
    decode_action,
    decode_candidates,
    fill_pages,
    key_difference,
    num_queries_seen,
    paper_tiers,
    threshold,
)
from diffkv.quant import ConfigError, QuantConfig

H, L, D = HIGH, LOW, DROPPED
INF = math.inf
APPEND = DecodeAction()
DROP = DecodeAction(drop=True)
DEMOTE = DecodeAction(demote=True)
DEMOTE_AND_EVICT = DecodeAction(demote=True, evict_low=True)


def tiers(means, alpha_high, alpha_low, window):
    return paper_tiers(torch.tensor([means]), Thresholds(alpha_high, alpha_low), window)[0].tolist()


def seen(positions, num_tokens, prompt_len):
    counts = num_queries_seen(
        torch.tensor(positions), torch.tensor(num_tokens), torch.tensor(prompt_len)
    )
    return counts.tolist()


class TestPrompt:
    def test_each_threshold_parts_two_tiers(self):
        # N = 8: alpha_high 2 -> 0.25, alpha_low 0.5 -> 0.0625; the last two are the window.
        means = [0.5, 0.25, 0.2, 0.0625, 0.06, 0.0, 0.0, 0.0]
        assert tiers(means, 2.0, 0.5, window=2) == [H, H, L, L, D, D, H, H]

    def test_ties_at_a_threshold_belong_to_the_tier_above(self):
        # N = 4: 0.25 is alpha_high / N, 0.125 is alpha_low / N, both exact in binary.
        below_high = math.nextafter(0.25, 0) - 1e-8
        below_low = math.nextafter(0.125, 0) - 1e-8
        means = [0.25, below_high, 0.125, below_low]
        assert tiers(means, 1.0, 0.5, window=0) == [H, L, L, D]

    @pytest.mark.parametrize("num_tokens", [1, 3, 4])
    def test_within_the_window_all_is_high(self, num_tokens):
        assert tiers([0.0] * num_tokens, 4.0, 4.0, window=4) == [H] * num_tokens

    def test_one_token_more_than_the_window_is_judged(self):
        assert tiers([0.0] * 5, 4.0, 4.0, window=4) == [D, H, H, H, H]

    def test_no_token_is_special_but_the_window(self):
        # The first token, a sink in most models, lives by its score alone.
        assert tiers([0.0, 1.0, 0.0, 0.0], 1.0, 1.0, window=1) == [D, H, D, H]

    def test_alpha_above_the_number_of_tokens_means_one(self):
        # The released code stops the device here. alpha_high / N = 100 / 4 is clamped to 1:
        # a token that has all the attention of every query is high all the same.
        assert tiers([1.0, 0.999, 0.5, 0.0], 100.0, 2.0, window=1) == [H, L, L, H]

    def test_alpha_zero_keeps_all_high(self):
        assert tiers([0.0, 0.1, 0.0, 0.0], 0.0, 0.0, window=1) == [H, H, H, H]

    def test_alpha_low_zero_drops_nothing(self):
        assert tiers([0.0, 0.3, 0.1, 0.0], 1.0, 0.0, window=1) == [L, H, L, H]

    def test_everything_but_the_window_can_be_dropped(self):
        assert tiers([0.9] * 6, 6.0, 6.0, window=2) == [D, D, D, D, H, H]

    def test_equal_thresholds_leave_the_low_tier_empty(self):
        # N = 4, both 0.5.
        assert tiers([0.6, 0.5, 0.4, 0.0], 2.0, 2.0, window=1) == [H, H, D, H]

    def test_heads_are_judged_on_their_own(self):
        means = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]])
        result = paper_tiers(means, Thresholds(1.0, 1.0), 1)
        assert result.dtype == torch.int8
        assert result.tolist() == [[H, D, H], [D, H, H]]

    def test_window_zero_protects_none(self):
        assert tiers([0.0, 0.0], 1.0, 1.0, window=0) == [D, D]


class TestMeans:
    def test_a_short_prompts_tokens_are_seen_by_themselves_and_what_follows(self):
        # min(N - i, 64) with N = 5.
        assert seen([0, 1, 2, 3, 4], 5, 5) == [5, 4, 3, 2, 1]

    def test_of_a_long_prompt_only_the_last_64_queries_count(self):
        # N = 100: token 36 = N - 64 is the last that all 64 have seen.
        assert seen([0, 35, 36, 37, 99], 100, 100) == [64, 64, 64, 63, 1]

    def test_each_generated_token_is_one_more_query(self):
        # Ten tokens after a prompt of 100: 74 queries for old ones, all of them for the newest.
        assert seen([0, 36, 37, 99], 110, 100) == [74, 74, 73, 11]

    def test_a_generated_token_is_seen_by_itself_and_what_follows(self):
        assert seen([100, 105, 109], 110, 100) == [10, 5, 1]

    def test_generated_tokens_are_not_clipped_at_64(self):
        assert seen([10, 11], 210, 10) == [200, 199]

    def test_a_mean_by_hand(self):
        # Token 3 of a prompt of 100 got 1.6 from 64 queries and 0.4 from 16 more: 2 / 80.
        count = seen([3], 116, 100)[0]
        assert (1.6 + 0.4) / count == 0.025


class TestThreshold:
    @pytest.mark.parametrize(
        ("alpha", "num_tokens", "expected"),
        [(3.0, 1024, 3 / 1024), (0.0, 7, 0.0), (1.0, 1, 1.0), (3.0, 2, 1.0), (1e30, 10, 1.0)],
    )
    def test_is_alpha_over_n_within_zero_and_one(self, alpha, num_tokens, expected):
        result = threshold(alpha, torch.tensor(num_tokens))
        assert result.dtype == torch.float32
        assert result.item() == expected

    def test_is_rounded_as_float32_does(self):
        expected = torch.tensor(0.02) / torch.tensor(3.0)
        assert threshold(0.02, torch.tensor(3)).item() == expected.item() != 0.02 / 3

    def test_takes_a_tensor_of_requests(self):
        result = threshold(torch.tensor([1.0, 6.0]), torch.tensor([4, 3]))
        assert result.tolist() == [0.25, 1.0]


class TestCandidates:
    def test_the_window_includes_the_new_token(self):
        # The new token is number 10; with a window of 4, tokens 7, 8, 9 and 10 are protected.
        positions = torch.arange(10)
        assert decode_candidates(positions, 10, 4).tolist() == [True] * 7 + [False] * 3

    def test_as_many_tokens_as_the_window_has_no_candidate(self):
        # Three tokens and the new one make up the window.
        assert not decode_candidates(torch.arange(3), 3, 4).any()

    def test_one_more_gives_one(self):
        assert decode_candidates(torch.arange(4), 4, 4).tolist() == [True, False, False, False]

    def test_a_window_above_64_does_not_freeze_prompt_tokens(self):
        # The released code asks how many queries a token has seen, which for prompt tokens is clipped
        # at 64: with a window of 96 it spares all of them for 32 steps. Here the position decides.
        positions, num_tokens, window = torch.arange(200), 200, 96
        assert decode_candidates(positions, num_tokens, window).sum() == 200 - 95
        counts = num_queries_seen(positions, torch.tensor(200), torch.tensor(200))
        assert not (counts >= window).any()

    def test_window_zero_protects_none_that_is_kept(self):
        assert decode_candidates(torch.arange(3), 3, 0).all()


class TestDecode:
    # alpha_high / N = 0.5, alpha_low / N = 0.125.
    def act(self, least_high, least_low, has_low=True):
        return decode_action(least_high, least_low, (0.5, 0.125), has_low)

    def test_nothing_outside_the_window(self):
        assert self.act(INF, INF) == APPEND

    def test_all_high_tokens_matter(self):
        assert self.act(0.75, INF) == APPEND

    def test_stale_low_tokens_stay_while_no_high_token_falls(self):
        assert self.act(0.75, 0.0) == APPEND
        assert self.act(INF, 0.0) == APPEND

    def test_a_high_token_between_the_thresholds_is_demoted(self):
        assert self.act(0.25, 0.25) == DEMOTE

    def test_demotion_without_a_low_token(self):
        assert self.act(0.25, INF) == DEMOTE

    def test_demotion_takes_the_place_of_a_low_token_that_matters_to_none(self):
        assert self.act(0.25, 0.0625) == DEMOTE_AND_EVICT

    def test_the_worst_high_token_is_dropped(self):
        assert self.act(0.0625, 0.25) == DROP

    def test_dropped_without_a_low_token(self):
        assert self.act(0.0625, INF) == DROP

    def test_a_drop_needs_to_be_less_than_every_low_token(self):
        # The low token matters even less, so it goes and the high one is demoted into its place.
        assert self.act(0.0625, 0.03125) == DEMOTE_AND_EVICT

    def test_equally_bad_is_not_less(self):
        assert self.act(0.0625, 0.0625) == DEMOTE_AND_EVICT

    def test_equal_to_the_high_threshold_is_no_victim(self):
        assert self.act(0.5, INF) == APPEND
        assert self.act(math.nextafter(0.5, 0), INF) == DEMOTE

    def test_equal_to_the_low_threshold_is_not_dropped(self):
        assert self.act(0.125, INF) == DEMOTE
        assert self.act(math.nextafter(0.125, 0), INF) == DROP

    def test_a_low_token_equal_to_the_low_threshold_is_not_evicted(self):
        assert self.act(0.25, 0.125) == DEMOTE
        assert self.act(0.25, math.nextafter(0.125, 0)) == DEMOTE_AND_EVICT

    def test_zero_thresholds_never_act(self):
        assert decode_action(0.0, 0.0, (0.0, 0.0), has_low=True) == APPEND

    def test_equal_thresholds_drop_or_append(self):
        assert decode_action(0.1, INF, (0.25, 0.25), has_low=True) == DROP
        assert decode_action(0.25, INF, (0.25, 0.25), has_low=True) == APPEND

    def test_one_tier_never_demotes(self):
        assert self.act(0.25, INF, has_low=False) == APPEND
        assert self.act(0.0625, INF, has_low=False) == DROP
        assert self.act(0.75, INF, has_low=False) == APPEND


class TestThresholds:
    @pytest.mark.parametrize("name", ["alpha_high", "alpha_low"])
    @pytest.mark.parametrize("value", [math.nan, -0.01, -INF, INF])
    def test_what_is_no_number_of_zero_or_more_is_refused(self, name, value):
        values = {"alpha_high": 1.0, "alpha_low": 0.0, name: value}
        with pytest.raises(ConfigError) as error:
            Thresholds(**values)
        assert str(error.value) == f"{name} must be a number of 0 or more, got {value}"

    @pytest.mark.parametrize("value", [3.5e38, 10**400])
    def test_what_is_too_large_for_a_slot_is_refused(self, value):
        Thresholds(MOST_ALPHA)
        with pytest.raises(ConfigError, match=r"0 or more, at most 3.4e.38, got"):
            Thresholds(value)

    def test_high_below_low_is_refused(self):
        with pytest.raises(ConfigError) as error:
            Thresholds(alpha_high=0.5, alpha_low=0.75)
        assert str(error.value) == (
            "alpha_high must be at least alpha_low, got alpha_high 0.5 < alpha_low 0.75"
        )

    def test_above_one_is_allowed_for_both(self):
        assert Thresholds(4.0, 2.0) == Thresholds(alpha_high=4.0, alpha_low=2.0)

    def test_defaults(self):
        two_tiers, one_tier = QuantConfig.parse("k8v4-k4v2"), QuantConfig.parse("k8v4")
        assert Thresholds.choose(two_tiers) == Thresholds(20.0, 0.0)
        assert Thresholds.choose(one_tier) == Thresholds(0.0, 0.0)

    def test_a_low_threshold_above_the_default_lifts_it(self):
        assert Thresholds.choose(QuantConfig.parse("k8v4-k4v2"), alpha_low=25.0) == Thresholds(
            25, 25
        )

    def test_what_is_given_counts(self):
        assert Thresholds.choose(QuantConfig.parse("k8v4-k4v2"), 1.0, 0.02) == Thresholds(1, 0.02)

    def test_one_tier_has_one_threshold(self):
        one_tier = QuantConfig.parse("k8v4")
        assert Thresholds.choose(one_tier, alpha_low=0.04) == Thresholds(0.04, 0.04)
        assert Thresholds.choose(one_tier, 0.04, 0.04) == Thresholds(0.04, 0.04)

    def test_a_high_threshold_without_a_low_tier_is_refused(self):
        with pytest.raises(ConfigError) as error:
            Thresholds.choose(QuantConfig.parse("k8v4"), alpha_high=1.0, alpha_low=0.02)
        assert str(error.value) == (
            "k8v4 has no low tier, so alpha_high must be left out or equal alpha_low (0.02), "
            "got 1.0; name two formats to use it, as in k8v4-k4v2"
        )


def test_key_difference_finds_the_unusual_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 1, 64, generator=generator) + 0.3 * torch.randn(
        2, 100, 64, generator=generator
    )
    key[0, [7, 50]] = torch.randn(2, 64, generator=generator)
    key[1, [3, 99]] = -key[1, [3, 99]] * 5
    scores = key_difference(key)
    assert scores.shape == (2, 100) and scores.abs().max() <= 1.0001
    assert sorted(scores[0].topk(2).indices.tolist()) == [7, 50]
    assert sorted(scores[1].topk(2).indices.tolist()) == [3, 99]


def test_room_in_the_last_high_page_is_filled_with_the_best_low_tokens():
    tiers = torch.tensor([[0, 1, 1, 2, 1, 0], [1, 1, 0, 0, 0, 0], [2, 2, 2, 2, 0, 1]]).to(
        torch.int8
    )
    means = torch.tensor([[9, 0.2, 0.3, 7, 0.3, 9], [1, 2, 9, 9, 9, 9], [7, 7, 7, 7, 9, 0.0]])
    fill_pages(tiers, means, 4)
    assert tiers.tolist() == [[0, 1, 0, 2, 0, 0], [1, 1, 0, 0, 0, 0], [2, 2, 2, 2, 0, 0]]
    before = tiers.clone()
    fill_pages(tiers, means, 1)
    assert torch.equal(tiers, before)
