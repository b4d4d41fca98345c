"""Policies by name: the published rule, its ablation, and the interface that baselines share.

A policy decides the tiers of a prompt's tokens; all of them run on the same pages and are charged the
same bytes. Those here also decide for generated tokens, by the thresholds. A policy is called for one
layer of one request at a time. What they are compared with is in `diffkv.lab.evaluation.baselines`.

Text form: `paper`, or with settings `paper:distinct=0.75,queries=all`.

Attention says what the end of a prompt looked at, not what a later question will. So beside it a policy
with thresholds can look at the keys: `paper:distinct=0.75` drops the quarter of a prompt whose keys are
most alike (`policy.key_difference`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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

__all__ = [
    "ALL_QUERIES",
    "PAPER",
    "POLICIES",
    "Kind",
    "Policy",
    "parse",
    "read_queries",
    "read_share",
    "read_whole",
    "top",
    "with_distinct",
]

ALL_QUERIES = 1 << 30
"""As `scored_queries`: every query of the prompt counts."""


@dataclass(frozen=True)
class Policy:
    """How a cache decides.

    Attributes:
        text: the text form.
        tiers: decides a prompt's tokens, see `diffkv.policy.PromptPolicy`.
        uses_thresholds: whether alpha_high and alpha_low count, for generated tokens too; else they
            are both 0.
        scored_queries: a prompt is scored by so many of its last queries.
        needs_low: whether it puts tokens in the low tier whatever the thresholds are.
        keeps_all: whether every token stays high, so that there is nothing to decide.
        distinct: share of the tokens before the window that stays, those of the most unusual keys;
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
            thresholds: the request's.
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


def top(scores: Tensor, num_kept: int) -> Tensor:
    """Mark the `num_kept` largest of each row; of equal ones the later."""
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if num_kept:
        order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
        keep.scatter_(-1, scores.shape[-1] - 1 - order, True)
    return keep


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
    tiers[:, :num_before][top(before, min(num_before, num_high + num_low))] = LOW
    tiers[:, :num_before][top(before, num_high)] = HIGH
    tiers[:, num_before:] = HIGH
    return tiers


def read_share(name: str, text: str) -> float:
    """Read a setting that is a share.

    Raises:
        ConfigError: not a number in 0 .. 1.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a share of 0 .. 1, got {text!r}")
    return value


def read_whole(name: str, text: str, least: int = 0, also: str = "") -> int:
    """Read a setting that is a whole number.

    Raises:
        ConfigError: not a number, or too small.
    """
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}{also}, got {text!r}")
    return value


def read_queries(name: str, text: str) -> int:
    """Read how many of a prompt's last queries score it.

    Raises:
        ConfigError: neither `all` nor a number of at least 1.
    """
    return ALL_QUERIES if text == "all" else read_whole(name, text, 1, ", or all")


Reader = Callable[[str, str], Any]
"""(name, text) of a setting -> its value, or ConfigError."""


@dataclass(frozen=True)
class Kind:
    """A policy before its settings are known.

    Attributes:
        description: in a line.
        settings: what it can be given, and how each is read.
        make: called with the text form and the settings that were given, by name.
    """

    description: str
    settings: Mapping[str, Reader]
    make: Callable[..., Policy]


def _by_thresholds(description: str, tiers: PromptPolicy) -> Kind:
    """A policy that decides by thresholds, and may drop keys that are like others."""

    def make(text: str, queries: int = SCORED_QUERIES, distinct: float = 1.0) -> Policy:
        return Policy(text, tiers, uses_thresholds=True, scored_queries=queries, distinct=distinct)

    return Kind(description, {"queries": read_queries, "distinct": read_share}, make)


POLICIES: Mapping[str, Kind] = {
    "paper": _by_thresholds(
        "tiers by significance and two thresholds, each head by itself", paper_tiers
    ),
    "paper-uniform": _by_thresholds(
        "the same, but the heads of a layer get equal numbers of tokens", _paper_uniform
    ),
}
"""The policies that an engine can run, by name."""


def parse(text: str, kinds: Mapping[str, Kind] = POLICIES) -> Policy:
    """Read a policy's text form.

    Args:
        text: a name, or a name and settings.
        kinds: every policy that may be named.

    Raises:
        ConfigError: an unknown policy or setting, with those that there are; a bad value.
    """
    name, _, rest = text.strip().partition(":")
    kind = kinds.get(name)
    if kind is None:
        raise ConfigError(f"unknown policy {name!r}: there are {', '.join(kinds)}")
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        setting, separator, value = part.partition("=")
        if setting not in kind.settings or not separator or setting in given:
            known = ", ".join(kind.settings) or "none"
            raise ConfigError(
                f"policy {name} cannot read {part!r}: write setting=value once each, settings: {known}"
            )
        given[setting] = kind.settings[setting](setting, value)
    return kind.make(text.strip(), **given)


def with_distinct(text: str, distinct: float) -> str:
    """A policy's text form with a share of distinct keys, where it had none; 1 adds nothing."""
    if distinct >= 1:
        return text
    return f"{text}{',' if ':' in text else ':'}distinct={distinct:g}"


PAPER = parse("paper")
"""The default."""
