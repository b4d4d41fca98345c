"""The rule: which tokens a head keeps in high precision, which in low, and which it drops.

Plain torch, written once; the kernels are checked against it token by token. Everything is decided
for each KV head on its own. Sources: DiffKV (SOSP 2025) section 4; where its released code differs
from its text, the code is followed (docs/policy.md lists the differences).

Words: `sums` are significance sums, the attention that later queries gave a token, max over the query
heads of its group. A token's *mean* is its sum over the number of queries that could see it. `N` is
the number of tokens of the request before the token that is about to be added.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from diffkv.quant import ConfigError, QuantConfig

__all__ = [
    "DROPPED",
    "HIGH",
    "LOW",
    "MOST_ALPHA",
    "MOST_TOKENS",
    "SCORED_QUERIES",
    "WINDOW",
    "DecodeAction",
    "PromptPolicy",
    "Thresholds",
    "decode_action",
    "decode_candidates",
    "fill_pages",
    "key_difference",
    "num_queries_seen",
    "paper_tiers",
    "threshold",
    "tiers_by_bounds",
]

HIGH, LOW, DROPPED = 0, 1, 2
"""Tiers as stored in a tier tensor; HIGH and LOW index the tier dimension of the tables."""

SCORED_QUERIES = 64
"""A prompt is scored by the attention of its last 64 queries."""

WINDOW = 64
"""Most recent tokens that always stay high, unless an engine is told otherwise."""

MOST_TOKENS = 2**31 - 1
"""The largest number of tokens that kernels take, for a window too."""

MOST_ALPHA = torch.finfo(torch.float32).max
"""The largest threshold: a slot has its own in float32."""

PromptPolicy = Callable[[Tensor, "Thresholds", int], Tensor]
"""A policy for prompts: (means [num_kv_heads, N], thresholds, window) -> tiers [num_kv_heads, N]."""


@dataclass(frozen=True)
class Thresholds:
    """Where the tiers part: alpha / N is compared with a token's mean significance.

    alpha_high 0 and alpha_low 0 keep every token in high precision.
    """

    alpha_high: float = 0.0
    alpha_low: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no threshold. `not >=` also catches NaN."""
        for name in ("alpha_high", "alpha_low"):
            value = getattr(self, name)
            if not 0 <= value <= MOST_ALPHA:
                limit = f", at most {MOST_ALPHA:.3g}" if MOST_ALPHA < value < float("inf") else ""
                raise ConfigError(f"{name} must be a number of 0 or more{limit}, got {value}")
        if self.alpha_high < self.alpha_low:
            raise ConfigError(
                f"alpha_high must be at least alpha_low, got alpha_high {self.alpha_high} "
                f"< alpha_low {self.alpha_low}"
            )

    @classmethod
    def choose(
        cls,
        quant: QuantConfig,
        alpha_high: float | None = None,
        alpha_low: float | None = None,
    ) -> "Thresholds":
        """Fill in defaults, and refuse thresholds that a configuration has no tier for.

        Without a low tier there is one threshold: what is under it is dropped, so alpha_high, if
        given, must equal alpha_low.
        """
        low = 0.0 if alpha_low is None else alpha_low
        if quant.has_low:
            return cls(max(DEFAULT_ALPHA_HIGH, low) if alpha_high is None else alpha_high, low)
        if alpha_high is not None and alpha_high != low:
            raise ConfigError(
                f"{quant} has no low tier, so alpha_high must be left out or equal alpha_low "
                f"({low}), got {alpha_high}; name two formats to use it, as in k8v4-k4v2"
            )
        return cls(low, low)

    @property
    def drops(self) -> bool:
        """Whether tokens may be dropped."""
        return self.alpha_low > 0

    def of_part(self, num_tokens: int, of: int) -> "Thresholds":
        """The thresholds that `num_tokens` tokens are decided by as if they were `of`."""
        share = num_tokens / of
        return Thresholds(self.alpha_high * share, self.alpha_low * share)

    def for_tiers(self, has_low: bool) -> "Thresholds":
        """The thresholds with, or without, a low tier.

        Without one a token that is not high enough stays high, unless it is low enough to be dropped:
        alpha_low is the only threshold. `decode_action` says the same for generated tokens.
        """
        return self if has_low else Thresholds(self.alpha_low, self.alpha_low)


DEFAULT_ALPHA_HIGH = 20.0
"""Measured on a real model (docs/policy.md); published are 1 to 3. Nothing is dropped by default."""


def threshold(alpha: Tensor | float, num_tokens: Tensor) -> Tensor:
    """alpha / N in float32, clamped to [0, 1]: a mean probability is never above 1.

    Args:
        alpha: alpha_high or alpha_low, broadcast against num_tokens.
        num_tokens: N, integers of at least 1.
    """
    alpha = torch.as_tensor(alpha, dtype=torch.float32, device=num_tokens.device)
    return (alpha / num_tokens.to(torch.float32)).clamp(0.0, 1.0)


def num_queries_seen(positions: Tensor, num_tokens: Tensor, prompt_lens: Tensor) -> Tensor:
    """Number of queries that have contributed to each token's sum.

    A prompt token has been seen by those of the prompt's last 64 queries that come at or after it, and
    by every query since; a generated token by every query from its own on.

    Args:
        positions: int, index of each token in its request.
        num_tokens: int, N: tokens of the request so far, all of which have been queries.
        prompt_lens: int, tokens of the request's prompt. All three broadcast.
    """
    first = torch.where(
        positions < prompt_lens,
        torch.maximum(positions, prompt_lens - SCORED_QUERIES),
        positions,
    )
    return num_tokens - first


def tiers_by_bounds(
    means: Tensor, least_high: Tensor | float, least_low: Tensor | float, window: int
) -> Tensor:
    """The published rule for prompts, by bounds of the means.

    The last `window` tokens are high. Another token is high if its mean is at least `least_high`, low if
    at least `least_low`, and dropped otherwise.

    Args:
        means: [num_kv_heads, N] float32.
        least_high: alpha_high / N, see `threshold`.
        least_low: alpha_low / N.
        window: recent tokens that stay high; N <= window keeps all of them high.

    Returns:
        [num_kv_heads, N] int8 of HIGH, LOW and DROPPED.
    """
    tiers = torch.full(means.shape, DROPPED, dtype=torch.int8, device=means.device)
    tiers[means >= least_low] = LOW
    tiers[means >= least_high] = HIGH
    tiers[:, max(0, means.shape[1] - window) :] = HIGH
    return tiers


def paper_tiers(means: Tensor, thresholds: Thresholds, window: int) -> Tensor:
    """The published rule for a prompt of N tokens, see `tiers_by_bounds`.

    Args:
        means: [num_kv_heads, N] float32.
        thresholds: the request's thresholds.
        window: recent tokens that stay high.
    """
    num_tokens = torch.tensor(means.shape[1])
    # On the host: a device would be waited for
    least_high, least_low = (
        threshold(alpha, num_tokens).item()
        for alpha in (thresholds.alpha_high, thresholds.alpha_low)
    )
    return tiers_by_bounds(means, least_high, least_low, window)


def fill_pages(tiers: Tensor, means: Tensor, tokens_per_page: int) -> None:
    """Move the most significant low tokens up to where a head's last high page has room.

    A row that is closed grows no more, so the room would be lost; the row takes no page more. Of equal
    means the earlier token moves first; one that is no number stays.

    Args:
        tiers: [num_kv_heads, N] int8, changes.
        means: [num_kv_heads, N] float32.
        tokens_per_page: high tokens that a page holds.
    """
    room = -(tiers == HIGH).sum(1, keepdim=True) % tokens_per_page
    scores = torch.where((tiers == LOW) & (means >= 0), means, -1.0)
    best = scores.sort(dim=1, descending=True, stable=True)
    moves = (torch.arange(tiers.shape[1], device=tiers.device) < room) & (best.values >= 0)
    moved = torch.where(moves, HIGH, tiers.gather(1, best.indices))
    tiers.scatter_(1, best.indices, moved.to(tiers.dtype))


def key_difference(key: Tensor) -> Tensor:
    """Difference of each key from the mean direction of all keys of its head, from -1 to 1.

    A score that needs no query: what is asked after the prompt is often said by a token unlike the
    others. Source: KeyDiff (Park et al. 2025, arXiv 2504.15364).

    Args:
        key: [num_kv_heads, N, head_dim] of any float dtype, rotary embedding applied.

    Returns:
        [num_kv_heads, N] float32, the negative cosine; the largest are those to keep.
    """
    directions = normalize(key.float(), dim=-1)
    return -cosine_similarity(directions, directions.mean(1, keepdim=True), dim=-1)


@dataclass(frozen=True)
class DecodeAction:
    """Change of one head when a token is added. Exactly one of three, see `decode_action`.

    Attributes:
        drop: the high victim is dropped, the new token takes its place.
        demote: the high victim is requantised to low, the new token takes its place.
        evict_low: with demote, the high victim takes the place of the low victim, which is dropped.
    """

    drop: bool = False
    demote: bool = False
    evict_low: bool = False


def decode_candidates(positions: Tensor, num_tokens: int, window: int) -> Tensor:
    """Which kept tokens may be victims: those outside the window that the new token completes.

    Args:
        positions: int, index of each kept token.
        num_tokens: N; the new token has index N, and the window is N - window + 1 .. N.
        window: recent tokens that stay high.
    """
    return positions <= num_tokens - window


def decode_action(
    least_high: float, least_low: float, thresholds: tuple[float, float], has_low: bool
) -> DecodeAction:
    """The published rule for one generated token and one head.

    Args:
        least_high: smallest mean among the high candidates; infinity if there is none.
        least_low: smallest mean among the low candidates; infinity if there is none.
        thresholds: (alpha_high / N, alpha_low / N), clamped, float32 values.
        has_low: whether the configuration has a low tier.

    Returns:
        DecodeAction() means: the new token is added, nothing is lost.
    """
    threshold_high, threshold_low = thresholds
    if least_high < threshold_low and least_high < least_low:
        return DecodeAction(drop=True)
    if has_low and least_high < threshold_high:
        return DecodeAction(demote=True, evict_low=least_low < threshold_low)
    return DecodeAction()
