"""Settings that somebody chose for a reason, each with its source.

Published ones belong to a model; generic ones to a wish. Data, and how one is found: what to do with
it is up to the command line. What each loses on a real model is in `data/preset_losses.jsonl`, which
`tools/real_model_tables.py` makes of docs/results/real-model.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from diffkv import policies
from diffkv.model_config import ModelConfig
from diffkv.policy import DEFAULT_ALPHA_HIGH, WINDOW, Thresholds
from diffkv.quant import DEFAULT_QUANT, ConfigError, QuantConfig

__all__ = ["AUTO", "DEFAULT", "LOSSES", "PRESETS", "Loss", "Preset", "Sizes", "choose", "find"]

AUTO = "auto"
DEFAULT = "balanced"
"""The preset whose values an engine has by default."""

LOSSES = "preset_losses.jsonl"
"""The file of `diffkv.data` with a line for each preset that was measured: its name, and its loss."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that a published model is recognised by, whatever its folder is called."""

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int

    def match(self, model: ModelConfig) -> bool:
        """Whether a model has these sizes."""
        return self == Sizes(
            model.architecture, model.num_layers, model.hidden_size, model.vocab_size
        )


@dataclass(frozen=True)
class Loss:
    """What the settings of a preset lose on a real model.

    Attributes:
        model: its name.
        ratio_bf16: how many times fewer real bytes than bf16.
        kld_mean: mean KL divergence of next-token distributions from full precision, in nats.
        kld_p99: its 99 % quantile.
        same_top1: share of steps with the same most likely token.
    """

    model: str
    ratio_bf16: float
    kld_mean: float
    kld_p99: float
    same_top1: float

    def __str__(self) -> str:
        """In words."""
        return (
            f"on {self.model} mean KL {self.kld_mean:.4f}, 99 % {self.kld_p99:.3f}, "
            f"{self.ratio_bf16:.2f}x smaller than bf16"
        )


@cache
def _losses() -> dict[str, Loss]:
    text = (files("diffkv") / "data" / LOSSES).read_text(encoding="utf-8")
    return {row.pop("preset"): Loss(**row) for row in map(json.loads, text.splitlines())}


@dataclass(frozen=True)
class Preset:
    """A quantisation configuration and thresholds.

    Attributes:
        name: value of `--preset`.
        quant: text form of the formats.
        alpha_high: threshold of the high tier.
        alpha_low: threshold below which tokens are dropped.
        description: purpose, in a line.
        source: origin of the values.
        sizes: sizes of the models it was published for; None for a generic one.
        words: in the model's name, all of them; they part models of the same sizes.
        window: most recent tokens that always stay high.
        policy: policy that decides prompts by these thresholds.
    """

    name: str
    quant: str
    alpha_high: float
    alpha_low: float
    description: str
    source: str
    sizes: Sizes | None = None
    words: tuple[str, ...] = ()
    window: int = WINDOW
    policy: str = policies.PAPER.text

    def __post_init__(self) -> None:
        """Refuse what no engine would start with."""
        quant = QuantConfig.parse(self.quant)
        chosen = Thresholds.choose(quant, self.alpha_high, self.alpha_low)
        assert chosen == self.thresholds, f"{self.name}: an engine would run {chosen}"
        policies.parse(self.policy).check(quant)

    @property
    def thresholds(self) -> Thresholds:
        """Both of them."""
        return Thresholds(self.alpha_high, self.alpha_low)

    @property
    def loss(self) -> Loss | None:
        """What it loses on a real model, if that was measured."""
        return _losses().get(self.name)

    def match(self, model: ModelConfig) -> bool:
        """Whether it was published for a model."""
        name = model.name.lower()
        return (
            self.sizes is not None
            and self.sizes.match(model)
            and all(word in name for word in self.words)
        )


_LLAMA_3, _QWEN_2 = 128256, 152064
_QWEN_32B = Sizes("Qwen2ForCausalLM", 64, 5120, _QWEN_2)

PRESETS = (
    Preset(
        "quality",
        "k8v8-k4v4",
        DEFAULT_ALPHA_HIGH,
        0.0,
        "nearer to full precision, for more bytes: nothing below 4 bits, nothing dropped",
        "docs/results/real-model: nearer than k8v4 alone, and smaller",
    ),
    Preset(
        "balanced",
        DEFAULT_QUANT,
        DEFAULT_ALPHA_HIGH,
        0.0,
        "unimportant tokens in low precision, nothing dropped; the default",
        "docs/policy.md: nearer than the published formats and thresholds where both are as large",
    ),
    Preset(
        "distinct",
        DEFAULT_QUANT,
        30.0,
        0.0,
        "drops a quarter of a prompt, where keys are most alike",
        "docs/policy.md; docs/results/fidelity, of k8v4-k4v2 and alpha_high 10; KeyDiff (Park et al. "
        "2025, arXiv 2504.15364)",
        policy="paper:distinct=0.75",
    ),
    Preset(
        "max-compression",
        "k8v4-k4v2",
        5.0,
        0.04,
        "drops what the prompt's end does not attend to: a later question about it gets a worse answer",
        "DiffKV (SOSP 2025) section 4: the end of its calibrated range of alpha_high (1 to 5), and the "
        "largest alpha_low that it chose for a model; not published together",
    ),
    Preset(
        "llama-3-8b",
        "k8v4-k4v2",
        1.0,
        0.02,
        "Llama-3-8B and models of its sizes",
        "DiffKV (SOSP 2025) section 4; benchmarks/benchmark_throughput.sh: Llama-3-8B-Instruct",
        Sizes("LlamaForCausalLM", 32, 4096, _LLAMA_3),
    ),
    Preset(
        "llama-3-70b",
        "k8v4-k4v2",
        1.0,
        0.0,
        "Llama-3-70B and models of its sizes",
        "DiffKV (SOSP 2025) section 4; benchmarks/benchmark_throughput.sh: Llama-3-70B-Instruct",
        Sizes("LlamaForCausalLM", 80, 8192, _LLAMA_3),
    ),
    Preset(
        "qwen2.5-7b",
        "k8v4",
        0.04,
        0.04,
        "Qwen2.5-7B and models of its sizes: a token is high or dropped, there is no low tier",
        "DiffKV (SOSP 2025) section 4; benchmarks/benchmark_throughput.sh: Qwen2.5-7B-Instruct "
        "(both thresholds 0.04, so the low tier of its K8V4-K4V2 stays empty)",
        Sizes("Qwen2ForCausalLM", 28, 3584, _QWEN_2),
    ),
    Preset(
        "qwq-32b",
        "k8v4g1x2-k4v2g2x4",
        3.0,
        0.0,
        "QwQ-32B; values, and low keys, in groups, as in the published accuracy runs",
        "DiffKV (SOSP 2025) section 4; try_qwq_32b.sh: thresholds and groups 1, 2, 2, 4 "
        "(its throughput runs had no groups)",
        _QWEN_32B,
        ("qwq",),
    ),
    Preset(
        "qwen2.5-32b",
        "k8v4-k4v2",
        3.0,
        0.0,
        "Qwen2.5-32B and models of its sizes",
        "DiffKV (SOSP 2025) section 4; benchmarks/benchmark_throughput.sh: Qwen2.5-32B-Instruct",
        _QWEN_32B,
    ),
)
"""Where two match a model, the first one is taken."""

UNPUBLISHED = ("r1-distill",)
"""In names of models of the same sizes for which the paper names no thresholds."""


def find(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: there is none; lists the names.
    """
    for preset in PRESETS:
        if preset.name == name:
            return preset
    names = ", ".join((AUTO, *(preset.name for preset in PRESETS)))
    raise ConfigError(f"unknown preset {name!r}: there are {names}")


def choose(model: ModelConfig) -> tuple[Preset, str]:
    """The preset for a model, and why, in words."""
    sizes = (
        f"{model.architecture or 'a model'} with {model.num_layers} layers of {model.hidden_size} and "
        f"{model.vocab_size} tokens"
    )
    default = find(DEFAULT)
    distilled = next((word for word in UNPUBLISHED if word in model.name.lower()), None)
    for preset in PRESETS:
        if preset.match(model):
            if distilled is not None:
                return default, f"no thresholds are published for {distilled} models"
            named = f", named {'-'.join(preset.words)}" if preset.words else ""
            return preset, f"{sizes}{named}"
    return default, f"nothing is published for {sizes}"
