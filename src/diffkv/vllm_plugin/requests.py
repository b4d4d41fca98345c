"""Per-request settings: `SamplingParams.extra_args`, or `vllm_xargs` in an OpenAI request.

`diffkv_alpha_high` and `diffkv_alpha_low` replace the engine's thresholds, `diffkv="off"` keeps all of
the request's tokens high.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffkv.policy import MOST_ALPHA, Thresholds
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.options import Options

__all__ = ["PREFIX", "THRESHOLDS", "Settings", "admission_path", "thresholds_of"]

PREFIX = "diffkv"
"""Settings of ours begin with it; a misspelt one is refused, others are not ours."""

_KNOWN = ("diffkv", "diffkv_alpha_high", "diffkv_alpha_low")

THRESHOLDS = ("alpha_high", "alpha_low")

_ADMISSIONS = {THRESHOLDS: "Admission", ("alpha_high",): "HighAdmission", (): "FixedAdmission"}
"""Classes of `front.admission` by the thresholds that a request may set above 0."""


def admission_path(options: Options) -> str:
    """The argument of `--logits-processors` that has an engine's requests checked."""
    return f"diffkv.vllm_plugin.front.admission:{_ADMISSIONS[options.settable_thresholds()]}"


def thresholds_of(extra_args: Mapping[str, Any] | None, options: Options) -> Thresholds:
    """The thresholds that a request runs with.

    Args:
        extra_args: the request's.
        options: the engine's.

    Raises:
        ConfigError: names the setting, its value and what would work.
    """
    settings = Settings.parse(extra_args, options.settable_thresholds())
    return settings.thresholds(options.thresholds(), options.quant_config().has_low)


@dataclass(frozen=True)
class Settings:
    """A request's own settings; None leaves a threshold to the engine."""

    off: bool = False
    alpha_high: float | None = None
    alpha_low: float | None = None

    @classmethod
    def parse(
        cls, extra_args: Mapping[str, Any] | None, settable: Sequence[str] = THRESHOLDS
    ) -> "Settings":
        """Read a request's settings.

        Args:
            extra_args: the request's; names that do not begin with our prefix are not ours.
            settable: thresholds that the engine lets a request set above 0
                (`Options.settable_thresholds`).

        Raises:
            ConfigError: names the setting, its value and what would work.
        """
        ours = {k: v for k, v in (extra_args or {}).items() if k.startswith(PREFIX)}
        for name in ours:
            if name not in _KNOWN:
                raise ConfigError(f"unknown setting {name!r}: there are {', '.join(_KNOWN)}")
        switch = ours.get("diffkv", "on")
        if switch not in ("on", "off"):
            raise ConfigError(f'diffkv must be "on" or "off" (all tokens high), got {switch!r}')
        high, low = (
            _threshold(name, ours.get(f"{PREFIX}_{name}"), name in settable) for name in THRESHOLDS
        )
        if switch == "off" and len(ours) > 1:
            raise ConfigError('diffkv "off" keeps all tokens high: leave the thresholds out')
        if high is not None and low is not None:
            Thresholds(high, low)
        return cls(switch == "off", high, low)

    def thresholds(self, engine: Thresholds, has_low: bool) -> Thresholds:
        """The request's thresholds: its own where it sets them, the engine's otherwise.

        A request that sets one of them moves the engine's other one along where they would cross.
        Without a low tier there is one threshold, alpha_low; alpha_high alone stands for it too.

        Args:
            engine: the engine's.
            has_low: whether the engine has a low tier.
        """
        if self.off:
            return Thresholds()
        if not has_low:
            given = self.alpha_high if self.alpha_low is None else self.alpha_low
            alpha = engine.alpha_low if given is None else given
            return Thresholds(alpha, alpha)
        if self.alpha_high is not None:
            low = engine.alpha_low if self.alpha_low is None else self.alpha_low
            return Thresholds(self.alpha_high, min(low, self.alpha_high))
        if self.alpha_low is not None:
            return Thresholds(max(engine.alpha_high, self.alpha_low), self.alpha_low)
        return engine


def _threshold(threshold: str, value: Any, is_settable: bool) -> float | None:
    if value is None:
        return None
    name = f"{PREFIX}_{threshold}"
    message = f"{name} must be a number of 0 or more, got {value!r}"
    if isinstance(value, bool):
        raise ConfigError(message)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # the last: a whole number beyond all floats
        raise ConfigError(message) from None
    if MOST_ALPHA < number < float("inf"):
        raise ConfigError(f"{name} must be at most {MOST_ALPHA:.3g}, got {value!r}")
    if not 0 <= number <= MOST_ALPHA:
        raise ConfigError(message)
    if number > 0 and not is_settable:
        raise ConfigError(
            f"{name} must be 0 in this engine, got {value!r}: it keeps no sums by which tokens are "
            f"dropped; start it with --drops"
        )
    return number
