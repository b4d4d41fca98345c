"""One engine that answers several times, each time with thresholds of its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from diffkv.policy import Thresholds
from diffkv.vllm_plugin.front.offline import (
    Answer,
    CacheUse,
    answer,
    cache_use,
    engine,
    engine_arguments,
)
from diffkv.vllm_plugin.options import Options

__all__ = ["Meter", "Session", "session"]

COUNTS = ("num_tokens", "high", "low", "num_bytes", "num_pages")
"""Of a rank's totals, those that grow with each request that ends."""


class Meter:
    """Counts what an engine's requests spend between two readings; no request may run at either.

    Args:
        llm: vLLM's engine.
        options: DiffKV's; None where vLLM has its own cache, which is not metered.
    """

    def __init__(self, llm: Any, options: Options | None) -> None:
        self._llm = llm
        self._options = options
        self._before = self._read()

    def _read(self) -> list[dict[str, Any]]:
        return [] if self._options is None else self._llm.collective_rpc("diffkv_summary")

    def take(self, thresholds: Thresholds | None = None) -> CacheUse | None:
        """What was spent since the last reading; None without DiffKV or where nothing was.

        Args:
            thresholds: of the requests, if they were not the engine's.
        """
        if self._options is None:
            return None
        before, self._before = self._before, self._read()
        ranks = [
            {**now, "totals": _difference(now["totals"], then["totals"])}
            for now, then in zip(self._before, before, strict=True)
        ]
        if ranks[0]["totals"]["num_tokens"] == 0:
            return None
        return cache_use(self._options, ranks, thresholds)


def _difference(now: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    return {**now, **{name: now[name] - then[name] for name in COUNTS}}


class Session:
    """An engine that is running. See `session`."""

    def __init__(self, llm: Any, options: Options | None) -> None:
        self._llm = llm
        self._meter = Meter(llm, options)

    def answer(
        self,
        prompts: Sequence[str],
        sampling: Sequence[dict[str, Any]],
        thresholds: Thresholds | None = None,
    ) -> tuple[list[Answer], CacheUse | None]:
        """Answer prompts.

        Args:
            prompts: texts.
            sampling: arguments of vLLM's SamplingParams, for each prompt.
            thresholds: the requests' own; None takes the engine's.

        Returns:
            Answers in the order of the prompts, and what they spent; None with vLLM's own cache.

        Raises:
            ConfigError: a prompt does not fit the model, or a bad argument of sampling.
        """
        ours = {} if thresholds is None else {"extra_args": _settings(thresholds)}
        answers = answer(self._llm, prompts, [{**each, **ours} for each in sampling])
        return answers, self._meter.take(thresholds)


def _settings(thresholds: Thresholds) -> dict[str, float]:
    return {
        "diffkv_alpha_high": thresholds.alpha_high,
        "diffkv_alpha_low": thresholds.alpha_low,
    }


@contextlib.contextmanager
def session(arguments: dict[str, Any], options: Options | None) -> Iterator[Session]:
    """An engine for a while.

    Args:
        arguments: arguments of vLLM's engine, the model among them.
        options: DiffKV's; None runs vLLM with its own cache.

    Raises:
        ConfigError: the engine cannot start.
    """
    with engine(engine_arguments(arguments, options)) as llm:
        yield Session(llm, options)
