"""Policies by name: the published rule, and the baselines that it is compared with.

A policy decides the tiers of a prompt's tokens; all of them run on the same pages and are charged the
same bytes. A baseline leaves generated tokens high. `paper` and its ablation decide for generated tokens
too, by the thresholds. A policy is called for one layer of one request at a time.

Text form: `topk`, or with settings `topk:keep=0.25,sinks=4`.

Attention says what the end of a prompt looked at, not what a later question will. So beside it a policy
with thresholds can look at the keys: `paper:distinct=0.75` drops the quarter of a prompt whose keys are
most alike (`policy.key_difference`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffkv.policy import (
    DROPPED,
    HIGH,
    LOW,
    SCORED_QUERIES,
    PromptPolicy,
    Thresholds,
    key_difference,
    paper_tiers,
)
from diffkv.quant import ConfigError, QuantConfig

__all__ = ["ALL_QUERIES", "PAPER", "POLICIES", "Policy", "parse", "with_distinct"]

ALL_QUERIES = 1 << 30
"""As `scored_queries`: every query of the prompt counts."""


@dataclass(frozen=True)
class Policy:
    """How a cache decides.

    Attributes:
        text: the text form.
        tiers: of a prompt's tokens, see `diffkv.policy.PromptPolicy`.
        uses_thresholds: whether alpha_high and alpha_low count, for generated tokens too; else they
            are both 0.
        scored_queries: a prompt is scored by so many of its last queries.
        needs_low: whether it puts tokens in the low tier whatever the thresholds are.
        keeps_all: whether every token stays high, so that there is nothing to decide.
        distinct: of the tokens before the window this share stays, those of the most unusual keys;
            a token that the thresholds call high stays anyway.
    """

    text: str
    tiers: PromptPolicy
    uses_thresholds: bool = False
    scored_queries: int = SCORED_QUERIES
    needs_low: bool = False
    keeps_all: bool = False
    distinct: float = 1.0

    def __str__(self) -> str:
        """The text form."""
        return self.text

    def fresh(self) -> "Policy":
        """The same policy before its first call: one that draws begins its draws again."""
        return parse(self.text)

    def decides(self, thresholds: Thresholds) -> bool:
        """Whether any token of a prompt may leave the high tier."""
        if self.uses_thresholds:
            return thresholds != Thresholds()
        return not self.keeps_all

    @property
    def by_token(self) -> bool:
        """Whether each token's tier follows from its own mean alone, so that prompts may be joined."""
        return self.tiers is paper_tiers and self.distinct == 1

    def decide(self, means: Tensor, key: Tensor, thresholds: Thresholds, window: int) -> Tensor:
        """Tiers of a prompt's tokens, [num_kv_heads, N] int8.

        Args:
            means: [num_kv_heads, N] float32, mean significance.
            key: [N, num_kv_heads, head_dim], as attention reads them.
            thresholds: of the request.
            window: recent tokens that stay high.
        """
        tiers = self.tiers(means, thresholds, window)
        num_before = max(0, means.shape[1] - window)
        num_alike = num_before - round(self.distinct * num_before)
        if num_alike:
            difference = key_difference(key.transpose(0, 1))[:, :num_before]
            alike = difference.argsort(dim=-1, stable=True)[:, :num_alike]
            before = tiers[:, :num_before]
            chosen = before.gather(-1, alike)
            chosen[chosen == LOW] = DROPPED
            before.scatter_(-1, alike, chosen)
        return tiers

    def check(self, quant: QuantConfig) -> None:
        """Refuse formats that the policy cannot work with.

        Raises:
            ConfigError: it wants a low tier and there is none.
        """
        if self.distinct < 1 and not quant.has_low:
            raise ConfigError(
                f"policy {self.text} drops tokens that would be low, but {quant} has no low tier: "
                f"name two formats, as in k8v4-k4v2"
            )
        if self.needs_low and not quant.has_low:
            raise ConfigError(
                f"policy {self.text} keeps tokens in the low tier, but {quant} has none: name two "
                f"formats, as in k8v4-k4v2, or survivors=high"
            )


@dataclass(frozen=True)
class _Settings:
    """Values of all settings that some policy has; each policy names its own in `POLICIES`."""

    keep: float = 0.25
    sinks: int = 0
    queries: int = SCORED_QUERIES
    survivors: str = "high"
    seed: int = 0
    distinct: float = 1.0

    @property
    def tier(self) -> int:
        """The tier of tokens outside the window that stay."""
        return LOW if self.survivors == "low" else HIGH

    def num_kept(self, num_tokens: int, window: int) -> int:
        """Tokens before the window that a head keeps."""
        before = max(0, num_tokens - window)
        return min(before, max(self.sinks, round(self.keep * num_tokens) - window, 0))


def _kept(means: Tensor, keep: Tensor, tier: int, window: int) -> Tensor:
    """Tiers of tokens of which `keep` says whether they stay; those of the window are high anyway."""
    tiers = torch.full(means.shape, DROPPED, dtype=torch.int8, device=means.device)
    tiers[keep] = tier
    tiers[:, max(0, means.shape[1] - window) :] = HIGH
    return tiers


def _top(scores: Tensor, num_kept: int) -> Tensor:
    """Mark the `num_kept` largest of each row; of equal ones the later."""
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if num_kept:
        order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
        keep.scatter_(-1, scores.shape[-1] - 1 - order, True)
    return keep


def _protected(scores: Tensor, sinks: int) -> Tensor:
    """Scores with those of the sinks above all others."""
    scores = scores.clone()
    scores[:, :sinks] = torch.inf
    return scores


def _none(means: Tensor, thresholds: Thresholds, window: int) -> Tensor:
    return torch.full(means.shape, HIGH, dtype=torch.int8, device=means.device)


def _window(settings: _Settings, means: Tensor, thresholds: Thresholds, window: int) -> Tensor:
    """StreamingLLM: the first tokens and the latest ones."""
    num_tokens = means.shape[1]
    num_kept = settings.num_kept(num_tokens, window)
    recent = min(window, num_tokens) + num_kept - min(settings.sinks, num_kept)
    position = torch.arange(num_tokens, device=means.device)
    keep = (position < settings.sinks) | (position >= num_tokens - recent)
    return _kept(means, keep.expand_as(means), settings.tier, window)


def _topk(settings: _Settings, means: Tensor, thresholds: Thresholds, window: int) -> Tensor:
    """SnapKV, or H2O of a prompt with queries=all: each head keeps its own tokens of largest score."""
    num_before = max(0, means.shape[1] - window)
    scores = _protected(means[:, :num_before], settings.sinks)
    keep = torch.zeros(means.shape, dtype=torch.bool, device=means.device)
    keep[:, :num_before] = _top(scores, settings.num_kept(means.shape[1], window))
    return _kept(means, keep, settings.tier, window)


def _topk_uniform(
    settings: _Settings, means: Tensor, thresholds: Thresholds, window: int
) -> Tensor:
    """All heads keep the same tokens: those of the largest score, summed over heads."""
    return _topk(settings, means.sum(0, keepdim=True).expand_as(means), thresholds, window)


def _topk_adaptive(
    settings: _Settings, means: Tensor, thresholds: Thresholds, window: int
) -> Tensor:
    """Ada-KV without its floor: the heads of a layer compete for one budget."""
    heads, num_tokens = means.shape
    num_before = max(0, num_tokens - window)
    scores = _protected(means[:, :num_before], settings.sinks)
    num_kept = heads * settings.num_kept(num_tokens, window)
    keep = torch.zeros(means.shape, dtype=torch.bool, device=means.device)
    keep[:, :num_before] = _top(scores.flatten(), num_kept).view(heads, num_before)
    return _kept(means, keep, settings.tier, window)


class _Random:
    """Each head keeps tokens drawn at random; draws follow one another, so the order of calls counts."""

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._generator = torch.Generator().manual_seed(settings.seed)

    def __call__(self, means: Tensor, thresholds: Thresholds, window: int) -> Tensor:
        drawn = torch.rand(means.shape, generator=self._generator).to(means.device)
        return _topk(self._settings, drawn, thresholds, window)


def _paper_uniform(means: Tensor, thresholds: Thresholds, window: int) -> Tensor:
    """The published rule's numbers of tokens, split evenly over the heads of a layer.

    Each head keeps its own most significant tokens. The layer spends what the rule would spend, up to
    rounding; only the budget of a head no longer follows its attention.
    """
    num_before = max(0, means.shape[1] - window)
    published = paper_tiers(means, thresholds, window)[:, :num_before]
    num_high, num_low = (
        round(int((published == tier).sum()) / means.shape[0]) for tier in (HIGH, LOW)
    )
    before = means[:, :num_before]
    tiers = torch.full(means.shape, DROPPED, dtype=torch.int8, device=means.device)
    tiers[:, :num_before][_top(before, min(num_before, num_high + num_low))] = LOW
    tiers[:, :num_before][_top(before, num_high)] = HIGH
    tiers[:, num_before:] = HIGH
    return tiers


@dataclass(frozen=True)
class _Kind:
    """One policy of the registry: its settings, and what makes it of them."""

    description: str
    settings: tuple[str, ...]
    make: Callable[[_Settings], PromptPolicy]
    uses_thresholds: bool = False
    keeps_all: bool = False


_SHARES = ("keep", "distinct")
_BUDGET = ("keep", "sinks", "survivors")

POLICIES = {
    "paper": _Kind(
        "tiers by significance and two thresholds, each head by itself",
        ("queries", "distinct"), lambda _: paper_tiers, uses_thresholds=True,
    ),
    "paper-uniform": _Kind(
        "the same, but the heads of a layer get equal numbers of tokens",
        ("queries", "distinct"), lambda _: _paper_uniform, uses_thresholds=True,
    ),
    "none": _Kind(
        "every token in the high tier: uniform quantisation",
        (), lambda _: _none, keeps_all=True,
    ),
    "window": _Kind(
        "StreamingLLM: the first and the latest tokens",
        _BUDGET, lambda settings: partial(_window, settings),
    ),
    "topk": _Kind(
        "SnapKV, or H2O with queries=all: the most significant tokens of each head",
        (*_BUDGET, "queries"), lambda settings: partial(_topk, settings),
    ),
    "topk-uniform": _Kind(
        "the same tokens for all heads of a layer, by the sum of their significance",
        (*_BUDGET, "queries"), lambda settings: partial(_topk_uniform, settings),
    ),
    "topk-adaptive": _Kind(
        "Ada-KV: the most significant tokens of a layer, whichever head has them",
        (*_BUDGET, "queries"), lambda settings: partial(_topk_adaptive, settings),
    ),
    "random": _Kind(
        "tokens at random, each head its own",
        (*_BUDGET, "seed"), _Random,
    ),
}  # fmt: skip
"""Every policy by name."""


def _read(name: str, text: str) -> float | int | str:
    """One setting's value.

    Raises:
        ConfigError: not one that the setting can have.
    """
    if name == "survivors":
        if text not in ("high", "low"):
            raise ConfigError(f"survivors must be high or low, got {text!r}")
        return text
    if name == "queries" and text == "all":
        return ALL_QUERIES
    try:
        value = float(text) if name in _SHARES else int(text)
    except ValueError:
        value = -1
    if name in _SHARES and not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a share of 0 .. 1, got {text!r}")
    least = 1 if name == "queries" else 0
    if value < least:
        also = ", or all" if name == "queries" else ""
        raise ConfigError(f"{name} must be a whole number of at least {least}{also}, got {text!r}")
    return value


def parse(text: str) -> Policy:
    """Read a policy's text form.

    Raises:
        ConfigError: an unknown policy or setting, with those that there are; a bad value.
    """
    name, _, rest = text.strip().partition(":")
    kind = POLICIES.get(name)
    if kind is None:
        raise ConfigError(f"unknown policy {name!r}: there are {', '.join(POLICIES)}")
    given: dict[str, float | int | str] = {}
    for part in filter(None, rest.split(",")):
        setting, separator, value = part.partition("=")
        if setting not in kind.settings or not separator or setting in given:
            known = ", ".join(kind.settings) or "none"
            raise ConfigError(
                f"policy {name} cannot read {part!r}: write setting=value once each, settings: {known}"
            )
        given[setting] = _read(setting, value)
    settings = _Settings(**given)  # type: ignore[arg-type]
    return Policy(
        text.strip(),
        kind.make(settings),
        kind.uses_thresholds,
        settings.queries,
        needs_low=settings.survivors == "low",
        keeps_all=kind.keeps_all,
        distinct=settings.distinct,
    )


def with_distinct(text: str, distinct: float) -> str:
    """A policy's text form with a share of distinct keys, where it had none; 1 adds nothing."""
    if distinct >= 1:
        return text
    return f"{text}{',' if ':' in text else ':'}distinct={distinct:g}"


PAPER = parse("paper")
"""The default."""
