"""The expected size of a prompt once its tiers are known, learned from the prompts before it.

Learned are shares: the pages that a prompt took, of the most that one of its length can take.
Each is a bet. The manager and the worker deal with those that are lost.
"""

import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

from diffkv.policy import Thresholds
from diffkv.vllm_plugin.options import WORST_CASE, Options

__all__ = ["Prompt", "PromptSizes", "longest_whole", "why_worst_case"]

SEEN = 32
"""Prompts of a kind that are remembered. If the next one is like them, the chance that it is larger
than all of them is 1 in 33, before the margin."""

FEWEST_SEEN = 8
"""Prompts of a kind before their sizes are believed."""

MARGIN = 1.1
"""Times the largest share that is remembered."""

MOST_KINDS = 512
"""Kinds that are remembered; thresholds are the clients' choice, so they could grow without end."""


@dataclass(frozen=True)
class Prompt:
    """A prompt before it is computed, as far as its size depends on it.

    Attributes:
        num_tokens: tokens that are prefilled.
        thresholds: its request's.
    """

    num_tokens: int
    thresholds: Thresholds

    @property
    def kind(self) -> tuple[Thresholds, int]:
        """Prompts of one kind are estimated from each other: thresholds, and length by powers of 2.

        Length counts because the window, half-empty pages and alpha / N weigh less in longer prompts.
        """
        return self.thresholds, self.num_tokens.bit_length()


class PromptSizes:
    """Expects of a prompt the largest share among the latest of its kind, and a margin."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[Thresholds, int], deque[float]] = OrderedDict()

    def observe(self, prompt: Prompt, share: float) -> None:
        """Learn a prompt's size, as a share of its worst case."""
        seen = self._seen.setdefault(prompt.kind, deque(maxlen=SEEN))
        seen.append(share)
        self._seen.move_to_end(prompt.kind)
        if len(self._seen) > MOST_KINDS:
            self._seen.popitem(last=False)

    def expected(self, prompt: Prompt, most_pages: int) -> int:
        """Pages to set aside for a prompt: `most_pages`, its worst case, until its kind is known."""
        seen = self._seen.get(prompt.kind, ())
        # all high: nothing is decided, so nothing could be given up
        if len(seen) < FEWEST_SEEN or prompt.thresholds == Thresholds():
            return most_pages
        return min(most_pages, math.ceil(max(seen) * MARGIN * most_pages))


def why_worst_case(vllm_config: Any, options: Options) -> str | None:
    """Why an engine sets aside the worst case for every prompt; None where it does not."""
    scheduler = vllm_config.scheduler_config
    if options.admission == WORST_CASE:
        return f"--admission {WORST_CASE}"
    if vllm_config.max_concurrent_batches > 1:
        return "steps overlap (--async-scheduling), so a prompt's size is known too late"
    if scheduler.policy != "fcfs":
        return f"--scheduling-policy {scheduler.policy}"
    if not scheduler.scheduler_reserve_full_isl:
        return "--no-scheduler-reserve-full-isl"
    return None


def longest_whole(vllm_config: Any) -> int:
    """Tokens of the longest prompt that an engine computes in one step."""
    scheduler = vllm_config.scheduler_config
    most = int(scheduler.max_num_batched_tokens)
    return min(most, scheduler.long_prefill_token_threshold or most)
