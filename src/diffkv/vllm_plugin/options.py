"""DiffKV's options as an engine gets them, and what follows from them for one model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from diffkv.layout import PageLayout
from diffkv.policy import WINDOW, Thresholds
from diffkv.quant import ConfigError, QuantConfig

__all__ = ["DEFAULT_QUANT", "Options"]

DEFAULT_QUANT = "k8v4-k4v2"


@dataclass(frozen=True)
class Options:
    """What a user can set; the keys of `kv_connector_extra_config`.

    Attributes:
        quant: text form of the quantisation configuration.
        alpha_high: threshold of the high tier; None takes the default.
        alpha_low: threshold below which tokens are dropped.
        window: most recent tokens that always stay high.
        page_bytes: bytes of a page; None takes the size that wastes least.
        kernels: "reference" runs the plain torch operations; None the device's own kernels.
    """

    quant: str = DEFAULT_QUANT
    alpha_high: float | None = None
    alpha_low: float | None = None
    window: int = WINDOW
    page_bytes: int | None = None
    kernels: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no model could be served with."""
        for name, kinds in (
            ("alpha_high", (int, float, type(None))),
            ("alpha_low", (int, float, type(None))),
            ("window", (int,)),
            ("page_bytes", (int, type(None))),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        if self.window < 1:
            raise ConfigError(f"window must be at least 1 token, got {self.window}")
        if self.kernels not in (None, "reference"):
            raise ConfigError(f"kernels must be 'reference' or left out, got {self.kernels!r}")
        self.thresholds()

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> "Options":
        """Read options from a mapping, refusing keys that do not exist.

        Raises:
            ConfigError: an unknown key, or a bad value.
        """
        known = [field.name for field in fields(cls)]
        for key in extra_config:
            if key not in known:
                raise ConfigError(f"unknown DiffKV option {key!r}: there are {', '.join(known)}")
        return cls(**extra_config)

    def to_dict(self) -> dict[str, Any]:
        """The options that are not left to their defaults, for `kv_connector_extra_config`."""
        given = {k: v for k, v in asdict(self).items() if v is not None}
        return given

    def quant_config(self) -> QuantConfig:
        """The formats."""
        return QuantConfig.parse(self.quant)

    def thresholds(self) -> Thresholds:
        """The engine's default thresholds."""
        return Thresholds.choose(self.quant_config(), self.alpha_high, self.alpha_low)

    def without_thresholds(self) -> "Options":
        """The same, with every token in the high tier."""
        has_low = self.quant_config().low is not None
        return replace(self, alpha_high=0.0 if has_low else None, alpha_low=0.0)

    def layout(self, head_dim: int, element_bytes: int) -> PageLayout:
        """What is where in a page for a model."""
        return PageLayout.derive(self.quant_config(), head_dim, self.page_bytes, element_bytes)
