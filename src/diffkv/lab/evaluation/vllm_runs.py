"""Answers through vLLM, with DiffKV's plugin or with vLLM's own cache.

A prompt is all that vLLM is given, and it is compressed with its last token: so the setting is easy.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from diffkv.lab.evaluation.engine import CacheSpec, Compared
from diffkv.lab.evaluation.tasks import Sample, Setting
from diffkv.policies import PAPER
from diffkv.quant import ConfigError
from diffkv.use import CacheUse
from diffkv.vllm_plugin.front.session import Session, session
from diffkv.vllm_plugin.options import Options

__all__ = ["SETTING", "VLLMModel"]

SETTING = "easy"


def _options(cache: Compared) -> Options:
    """Options of the plugin: `none` is the published rule with both thresholds 0.

    Raises:
        ConfigError: a policy that the plugin does not have, or another engine's format.
    """
    if not isinstance(cache, CacheSpec):
        raise ConfigError(f"--engine vllm answers through caches of ours only, not {cache.name}")
    return Options(
        quant=str(cache.quant),
        alpha_high=cache.thresholds.alpha_high if cache.quant.has_low else None,
        alpha_low=cache.thresholds.alpha_low,
        window=cache.window,
        segment=cache.segment,
        policy=PAPER.text if cache.policy.keeps_all else cache.policy.text,
        page_bytes=cache.page_bytes,
        rotate=cache.rotate,
        kernels=cache.kernels,
        drops=cache.drops or None,
    )


class VLLMModel(contextlib.ExitStack):
    """One engine at a time, with the cache that was asked for last; close it to end the last one.

    Args:
        arguments: arguments of vLLM's engine, the model among them.
    """

    name = "vllm"

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self._arguments = arguments
        self._cache: Compared | None = None
        self._running: Session | None = None

    @property
    def dtype(self) -> str:
        """The model's, as vLLM was told; "auto": that of its checkpoint."""
        return str(self._arguments.get("dtype", "auto"))

    def check(self, cache: Compared, settings: Sequence[Setting]) -> None:
        """Refuse what vLLM cannot do; see `engine.Engine`."""
        _options(cache)
        if tuple(settings) != (SETTING,):
            raise ConfigError(
                f"--engine vllm runs the setting {SETTING} only: write --settings {SETTING}"
            )

    def answer(
        self, samples: Sequence[Sample], num_tokens: int, cache: Compared | None
    ) -> tuple[list[str], CacheUse | None]:
        """Answer samples; see `engine.Engine`.

        Raises:
            ConfigError: an engine that cannot start, or samples with choices.
        """
        if any(sample.choices for sample in samples):
            raise ConfigError("--engine vllm has no tasks with choices: name others by --tasks")
        if self._running is None or cache != self._cache:
            self.close()
            options = None if cache is None else _options(cache)
            self._running = self.enter_context(session(self._arguments, options))
            self._cache = cache
        sampling = [{"temperature": 0.0, "max_tokens": num_tokens} for _ in samples]
        answers, use = self._running.answer([sample.prompt for sample in samples], sampling)
        return [each.text for each in answers], use
