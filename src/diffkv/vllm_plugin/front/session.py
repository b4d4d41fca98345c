"""One engine that answers several times, each time with thresholds of its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from diffkv.policy import Thresholds
from diffkv.use import CacheUse
from diffkv.vllm_plugin.front.offline import (
    Answer,
    answer,
    cache_use,
    engine,
    engine_arguments,
)
from diffkv.vllm_plugin.options import Options

__all__ = ["Meter", "Session", "session"]


class Meter:
    """Counts what an engine's requests spend between two readings; no request may run at either.

    Args:
        llm: vLLM's engine.
        options: DiffKV's; None where vLLM has its own cache, which is not metered.
    """

    def __init__(self, llm: Any, options: Options | None) -> None:
        self._llm = llm
        self._is_ours = options is not None
        self._before = self._read()

    def _read(self) -> CacheUse:
        return (
            cache_use(self._llm.collective_rpc("diffkv_summary")) if self._is_ours else CacheUse()
        )

    def take(self) -> CacheUse | None:
        """What was spent since the last reading; None with vLLM's own cache or where nothing was."""
        before, self._before = self._before, self._read()
        use = self._before - before
        return use if use.tokens else None


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
        return answers, self._meter.take()


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
