"""What an evaluation needs: a cache to compare, and something that answers through it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from diffkv.lab.evaluation.other_formats import OtherFormat
from diffkv.lab.evaluation.results import Method
from diffkv.lab.evaluation.tasks import Sample, Setting
from diffkv.policies import Policy
from diffkv.policy import Thresholds
from diffkv.quant import QuantConfig
from diffkv.use import CacheUse
from diffkv.vllm_plugin.options import Options

__all__ = ["CacheSpec", "Compared", "Engine", "NamedCache"]


@dataclass(frozen=True)
class CacheSpec:
    """A cache that is compared with the full one.

    Attributes:
        quant: formats.
        policy: decides prompts.
        thresholds: the policy's; both 0 for one that has none.
        window: recent tokens that stay high.
        page_bytes: size of a page; None: the size that wastes least.
        kernels: "reference", or None for the device's own.
        rotate: "hadamard" or "none".
        segment: tokens after which a prompt is decided; 0: prompts are decided whole.
        drops: whether sums and positions of all tokens are kept, also where nothing is dropped.
    """

    quant: QuantConfig
    policy: Policy
    thresholds: Thresholds
    window: int
    page_bytes: int | None = None
    kernels: str | None = None
    rotate: str = "none"
    segment: int = 0
    drops: bool = False

    def __post_init__(self) -> None:
        """Refuse formats that the policy cannot work with."""
        self.policy.check(self.quant)

    @classmethod
    def of(cls, options: Options, policy: Policy | None = None) -> "CacheSpec":
        """The cache of an engine with such options.

        Args:
            options: the engine's.
            policy: one that an engine does not run, in place of the options' own.
        """
        policy = options.prompt_policy() if policy is None else policy
        return cls(
            options.quant_config(),
            policy,
            options.thresholds() if policy.uses_thresholds else Thresholds(),
            options.window,
            options.page_bytes,
            options.kernels,
            options.rotation(),
            options.segment if policy.uses_thresholds else 0,
            bool(options.drops),
        )

    def method(self, model: str, engine: str) -> Method:
        """The cache, a model and an engine as rows name them."""
        alphas = self.thresholds
        return Method(
            model,
            engine,
            str(self.quant),
            str(self.policy),
            alphas.alpha_high,
            alphas.alpha_low,
            self.window,
            self.rotate,
            self.segment,
            Method.words(self.page_bytes, self.kernels, self.drops),
        )


Compared = CacheSpec | OtherFormat
"""What is compared with the full cache: one of ours, or another engine's format."""


@dataclass(frozen=True)
class NamedCache:
    """A cache to compare with full precision.

    Attributes:
        name: in tables and files.
        kind: the cache.
    """

    name: str
    kind: Compared


class Engine(Protocol):
    """A model with one of its caches.

    Attributes:
        name: as rows name it.
    """

    name: str

    @property
    def dtype(self) -> str:
        """Of the model, as rows name it."""

    def check(self, cache: Compared, settings: Sequence[Setting]) -> None:
        """Refuse before anything runs.

        Raises:
            ConfigError: a cache or a setting that the engine does not have.
        """

    def answer(
        self, samples: Sequence[Sample], num_tokens: int, cache: Compared | None
    ) -> tuple[list[str], CacheUse | None]:
        """Answer samples greedily.

        Args:
            samples: what is asked.
            num_tokens: new tokens for each.
            cache: the compressed cache; None: the engine's own, in full precision.

        Returns:
            Texts in the order of the samples, and what a compressed cache held at the end.
        """
        ...
