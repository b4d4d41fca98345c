"""DiffKV's options for an engine, and what follows from them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from diffkv import policies, rotation
from diffkv.layout import PageLayout
from diffkv.policy import MOST_TOKENS, WINDOW, Thresholds
from diffkv.quant import DEFAULT_QUANT, ConfigError, QuantConfig
from diffkv.segments import SEGMENT
from diffkv.vllm_plugin.matrix import CONNECTOR

__all__ = ["ADMISSIONS", "DEFAULT_QUANT", "EXPECTED", "WORST_CASE", "Options", "options_of"]

EXPECTED, WORST_CASE = ADMISSIONS = ("expected", "worst-case")
"""Pages that are set aside for a prompt before its tiers are known."""


@dataclass(frozen=True)
class Options:
    """The options of an engine; the keys of `kv_connector_extra_config`.

    Attributes:
        quant: text form of the quantisation configuration.
        alpha_high: threshold of the high tier; None takes the default.
        alpha_low: threshold below which tokens are dropped.
        drops: whether the pool keeps sums and positions of every token, which dropping generated
            tokens takes, so that requests may set alpha_low; None: if the engine's own is above 0.
        window: most recent tokens that always stay high.
        segment: tokens after which a prompt is decided and its row closed, see `diffkv.segments`; 0:
            prompts are decided whole, and nothing is shared.
        policy: text form of the policy that decides prompts by these thresholds (`diffkv.policies`).
        page_bytes: bytes of a page; None takes the size that wastes least.
        rotate: "hadamard" rotates keys and values before they are quantised, "none" does not; None
            takes what goes with the formats, see `diffkv.rotation.choose`.
        kernels: "reference" runs the plain torch operations; None the device's own kernels.
        admission: "worst-case" sets aside what a prompt can need at most; "expected" what prompts
            like it have needed, see `estimate`.
    """

    quant: str = DEFAULT_QUANT
    alpha_high: float | None = None
    alpha_low: float | None = None
    drops: bool | None = None
    window: int = WINDOW
    segment: int = SEGMENT
    policy: str = policies.PAPER.text
    page_bytes: int | None = None
    rotate: str | None = None
    kernels: str | None = None
    admission: str = EXPECTED

    def __post_init__(self) -> None:
        """Refuse values that no model could be served with."""
        for name, kinds in (
            ("alpha_high", (int, float, type(None))),
            ("alpha_low", (int, float, type(None))),
            ("window", (int,)),
            ("segment", (int,)),
            ("page_bytes", (int, type(None))),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        for name in ("window", "segment"):
            if getattr(self, name) > MOST_TOKENS:
                raise ConfigError(
                    f"{name} must be at most {MOST_TOKENS} tokens, got {getattr(self, name)}"
                )
        if self.window < 1:
            raise ConfigError(f"window must be at least 1 token, got {self.window}")
        if self.segment and self.segment < self.window:
            raise ConfigError(
                f"segment must be 0, or at least the window ({self.window} tokens), got {self.segment}"
            )
        if self.drops not in (None, False, True):
            raise ConfigError(f"drops must be true or false, got {self.drops!r}")
        if self.kernels not in (None, "reference"):
            raise ConfigError(f"kernels must be 'reference' or left out, got {self.kernels!r}")
        if self.admission not in ADMISSIONS:
            raise ConfigError(
                f"admission must be {' or '.join(map(repr, ADMISSIONS))}, got {self.admission!r}"
            )
        alpha_low = self.thresholds().alpha_low
        if self.drops is False and alpha_low > 0:
            raise ConfigError(
                f"without drops alpha_low must be 0, got {alpha_low:g}: leave out --no-drops (drops)"
            )
        if self.policy.partition(":")[0].strip() not in policies.POLICIES:
            raise ConfigError(
                f"vLLM runs policies that go by alpha_high and alpha_low: "
                f"{', '.join(policies.POLICIES)}; got {self.policy!r}; diffkv eval compares others in "
                f"transformers"
            )
        self.prompt_policy().check(self.quant_config())
        self.rotation()

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
        """`quant` and what is not left to its default, for `kv_connector_extra_config`."""
        given = {name: value for name, value in asdict(self).items() if value != _DEFAULTS[name]}
        return {"quant": self.quant, **given}

    def prompt_policy(self) -> policies.Policy:
        """The policy that decides prompts."""
        return policies.parse(self.policy)

    def rotation(self) -> str:
        """The rotation of keys and values, see `rotate`."""
        return rotation.choose(self.rotate, self.quant_config())

    def quant_config(self) -> QuantConfig:
        """The formats of the tiers."""
        return QuantConfig.parse(self.quant)

    def thresholds(self) -> Thresholds:
        """The engine's default thresholds."""
        return Thresholds.choose(self.quant_config(), self.alpha_high, self.alpha_low)

    def keeps_sums(self) -> bool:
        """Whether every token has a sum and a position, for alpha_low of whatever request."""
        return self.thresholds().drops if self.drops is None else self.drops

    def settable_thresholds(self) -> tuple[str, ...]:
        """The thresholds that a request may set above 0.

        Without sums of low tokens none of them can be dropped; without a low tier either threshold
        stands for alpha_low.
        """
        if self.keeps_sums():
            return ("alpha_high", "alpha_low")
        return ("alpha_high",) if self.quant_config().has_low else ()

    def without_thresholds(self) -> "Options":
        """The same, with every token in the high tier."""
        return replace(self, alpha_high=0.0 if self.quant_config().has_low else None, alpha_low=0.0)

    def layout(self, head_dim: int, element_bytes: int) -> PageLayout:
        """What is where in a page."""
        return PageLayout.derive(
            self.quant_config(), head_dim, self.page_bytes, element_bytes, self.keeps_sums()
        )


_DEFAULTS = {field.name: field.default for field in fields(Options)}


def options_of(vllm_config: Any) -> Options | None:
    """DiffKV's options in a vLLM configuration; None if it is not turned on."""
    transfer = None if vllm_config is None else vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        return None
    return Options.parse(transfer.kv_connector_extra_config)
