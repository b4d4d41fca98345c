"""Policies to compare the published rule with; they decide prompts, and leave generated tokens high.

Text form as in `diffkv.policies`: `topk`, or with settings `topk:keep=0.25,sinks=4`. They have no
thresholds, so that no engine runs them; a cache of `diffkv.hf` takes what `parse` returns.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffkv import policies
from diffkv.policies import Kind, Policy, read_queries, read_share, read_whole, top
from diffkv.policy import DROPPED, HIGH, LOW, SCORED_QUERIES, Thresholds
from diffkv.quant import ConfigError

__all__ = ["ALL_POLICIES", "BASELINES", "parse"]

Choose = Callable[[Tensor, int, int, int], Tensor]
"""(means [num_kv_heads, N], tokens to keep before the window, sinks, window) -> bool, what stays."""


def _protected(scores: Tensor, sinks: int) -> Tensor:
    """Scores with those of the sinks above all others."""
    scores = scores.clone()
    scores[:, :sinks] = torch.inf
    return scores


def _window(means: Tensor, num_kept: int, sinks: int, window: int) -> Tensor:
    """StreamingLLM: the first tokens and the latest ones."""
    num_tokens = means.shape[1]
    recent = min(window, num_tokens) + num_kept - min(sinks, num_kept)
    position = torch.arange(num_tokens, device=means.device)
    return ((position < sinks) | (position >= num_tokens - recent)).expand_as(means)


def _topk(means: Tensor, num_kept: int, sinks: int, window: int) -> Tensor:
    """SnapKV, or H2O of a prompt with queries=all: each head keeps its own tokens of largest score."""
    num_before = max(0, means.shape[1] - window)
    keep = torch.zeros(means.shape, dtype=torch.bool, device=means.device)
    keep[:, :num_before] = top(_protected(means[:, :num_before], sinks), num_kept)
    return keep


def _topk_uniform(means: Tensor, num_kept: int, sinks: int, window: int) -> Tensor:
    """All heads keep the same tokens: those of the largest score, summed over heads."""
    return _topk(means.sum(0, keepdim=True).expand_as(means), num_kept, sinks, window)


def _topk_adaptive(means: Tensor, num_kept: int, sinks: int, window: int) -> Tensor:
    """Ada-KV without its floor: the heads of a layer compete for one budget."""
    num_heads, num_before = means.shape[0], max(0, means.shape[1] - window)
    scores = _protected(means[:, :num_before], sinks).flatten()
    keep = torch.zeros(means.shape, dtype=torch.bool, device=means.device)
    keep[:, :num_before] = top(scores, num_heads * num_kept).view(num_heads, num_before)
    return keep


def _random(seed: int) -> Choose:
    """Each head keeps tokens drawn at random; draws follow one another, so the order of calls counts."""
    generator = torch.Generator().manual_seed(seed)

    def choose(means: Tensor, num_kept: int, sinks: int, window: int) -> Tensor:
        drawn = torch.rand(means.shape, generator=generator).to(means.device)
        return _topk(drawn, num_kept, sinks, window)

    return choose


def _tiers(
    choose: Choose,
    keep: float,
    sinks: int,
    tier: int,
    means: Tensor,
    thresholds: Thresholds,
    window: int,
) -> Tensor:
    """Tiers of a prompt of which a budget stays in one tier; the window is part of it, and high."""
    num_tokens = means.shape[1]
    before = max(0, num_tokens - window)
    num_kept = min(before, max(sinks, round(keep * num_tokens) - window, 0))
    tiers = torch.full(means.shape, DROPPED, dtype=torch.int8, device=means.device)
    tiers[choose(means, num_kept, sinks, window)] = tier
    tiers[:, before:] = HIGH
    return tiers


def _read_survivors(name: str, text: str) -> str:
    if text not in ("high", "low"):
        raise ConfigError(f"{name} must be high or low, got {text!r}")
    return text


BUDGET = {"keep": read_share, "sinks": read_whole, "survivors": _read_survivors}


def _budget(
    text: str,
    choose: Choose,
    *,
    keep: float = 0.25,
    sinks: int = 0,
    survivors: str = "high",
    queries: int = SCORED_QUERIES,
) -> Policy:
    tiers = partial(_tiers, choose, keep, sinks, LOW if survivors == "low" else HIGH)
    return Policy(text, tiers, scored_queries=queries, needs_low=survivors == "low")


def _by_score(description: str, choose: Choose) -> Kind:
    return Kind(description, {**BUDGET, "queries": read_queries}, partial(_budget, choose=choose))


def _all_high(means: Tensor, thresholds: Thresholds, window: int) -> Tensor:
    return torch.full(means.shape, HIGH, dtype=torch.int8, device=means.device)


BASELINES = {
    "none": Kind(
        "every token in the high tier: uniform quantisation",
        {},
        partial(Policy, tiers=_all_high, keeps_all=True),
    ),
    "window": Kind(
        "StreamingLLM: the first and the latest tokens", BUDGET, partial(_budget, choose=_window)
    ),
    "topk": _by_score(
        "SnapKV, or H2O with queries=all: the most significant tokens of each head", _topk
    ),
    "topk-uniform": _by_score(
        "the same tokens for all heads of a layer, by the sum of their significance", _topk_uniform
    ),
    "topk-adaptive": _by_score(
        "Ada-KV: the most significant tokens of a layer, whichever head has them", _topk_adaptive
    ),
    "random": Kind(
        "tokens at random, each head its own",
        {**BUDGET, "seed": read_whole},
        lambda text, seed=0, **settings: _budget(text, _random(seed), **settings),
    ),
}
"""The baselines by name."""

ALL_POLICIES = {**policies.POLICIES, **BASELINES}
"""Every policy that can be evaluated, by name."""


def parse(text: str) -> Policy:
    """Read the text form of a baseline or of a policy of `diffkv.policies`.

    One that draws begins its draws again with every reading.

    Raises:
        ConfigError: an unknown policy or setting, with those that there are; a bad value.
    """
    return policies.parse(text, ALL_POLICIES)
