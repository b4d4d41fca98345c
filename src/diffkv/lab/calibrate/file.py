"""The file that a calibration writes: what was chosen, for which model, by which data, and the curve."""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffkv.lab.calibrate.distance import Tried
from diffkv.lab.calibrate.search import Point, Setting
from diffkv.lab.provenance import collect
from diffkv.policy import Thresholds
from diffkv.quant import ConfigError, QuantConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "KLD",
    "Calibration",
    "Choice",
    "CurvePoint",
    "Data",
    "Model",
    "Source",
    "model_digest",
    "read",
]

KLD = "kld"
"""Metric: mean KL divergence of next-token distributions from those of full precision, in nats."""

HEADER = """\
# Thresholds that `diffkv calibrate` chose; `diffkv serve --calibration FILE` takes them.
"""

IGNORED_KEYS = ("_name_or_path", "transformers_version")
"""Fields of config.json that say where a model lies and who wrote the file, not what the model is."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(_Table):
    """Which model. The digest is of its configuration, not of its weights: see `model_digest`."""

    name: str
    config_sha256: str


class Data(_Table):
    """What it was asked, or read.

    Attributes:
        source: a name.
        samples: questions, or texts.
        seed: chose the questions.
        sha256: digest of all of it.
        metric: what a loss is: `KLD`, or one of `questions`, a share.
        steps: compared steps of each text.
    """

    source: str
    samples: int
    seed: int
    sha256: str
    metric: str
    steps: int | None = None


class Source(_Table):
    """How to do it again."""

    command: str
    versions: dict[str, str]

    @classmethod
    def here(cls, engine: str) -> "Self":
        """This run's.

        Args:
            engine: vllm or transformers.
        """
        origin = collect()
        versions = {name: str(getattr(origin, name)) for name in ("diffkv", "torch", engine)}
        return cls(command=origin.command, versions=versions)


class CurvePoint(_Table):
    """One setting that was measured.

    Attributes:
        alpha_high: threshold.
        alpha_low: threshold.
        distinct: share of a prompt that stays by its keys; 1 drops none.
        samples: it was measured on; a setting is given up once it is surely too bad.
        loss: mean over the samples.
        loss_ci95: its 95 % interval, bootstrapped; of questions.
        bytes_per_token: real bytes, whole pages and tables.
        ratio_bf16: bytes of a bf16 cache over them.
        high: share of tokens in the high tier.
        low: share in the low tier.
        dropped: share that is gone.
        accepted: whether the loss on all samples is within the limit.
        quant: formats, where they were searched.
        kld_p99: 99 % quantile of the divergences; of texts.
        same_top1: share of steps with the same first choice; of texts.
    """

    alpha_high: float = Field(ge=0)
    alpha_low: float = Field(ge=0)
    distinct: float = Field(default=1.0, gt=0, le=1)
    samples: int
    loss: float
    loss_ci95: tuple[float, float] | None = None
    bytes_per_token: float
    ratio_bf16: float
    high: float
    low: float
    dropped: float
    accepted: bool
    quant: str | None = None
    kld_p99: float | None = None
    same_top1: float | None = None

    @property
    def setting(self) -> Setting:
        """Its thresholds and drops."""
        return Setting(Thresholds(self.alpha_high, self.alpha_low), self.distinct)

    @classmethod
    def of(cls, point: Point, **more: Any) -> "Self":
        """A point of the search, in the file's terms, with values of a subclass."""
        spent: dict[str, Any] = point.use.per_token()
        del spent["nominal_ratio_bf16"]
        return cls(
            **_values(point.setting),
            samples=point.n,
            loss=point.loss,
            loss_ci95=point.ci95,
            accepted=point.accepted,
            **spent,
            **more,
        )

    @classmethod
    def tried(cls, tried: Tried, **more: Any) -> "Self":
        """A setting of the search by texts, likewise."""
        score = tried.score
        names = (
            *("bytes_per_token", "ratio_bf16", "high", "low", "dropped"),
            *("kld_p99", "same_top1"),
        )
        return cls(
            **_values(tried.setting),
            samples=score.n,
            loss=score.kld_mean,
            accepted=tried.accepted,
            quant=str(tried.quant),
            **{name: getattr(score, name) for name in names},
            **more,
        )


def _values(setting: Setting) -> dict[str, Any]:
    """A setting, in the file's terms."""
    return {**asdict(setting.thresholds), "distinct": setting.distinct}


class Choice(CurvePoint):
    """The point that was chosen, and what an engine needs beside it.

    Attributes:
        quant: formats.
        window: recent tokens that stay high.
        segment: tokens after which a prompt is decided; files that do not say are of segments of 1,024.
    """

    quant: str
    window: int
    segment: int = 1024


class Calibration(_Table):
    """The whole file.

    Attributes:
        format: of the file.
        max_loss: limit of the loss, in the unit of the metric.
        max_p99: limit of the 99 % quantile, where one was given.
        model: which.
        data: what it was asked, or read.
        choice: what an engine takes.
        source: how to do it again.
        curve: every setting that was measured.
    """

    format: Literal[1] = 1
    max_loss: float
    max_p99: float | None = None
    model: Model
    data: Data
    choice: Choice
    source: Source
    curve: list[CurvePoint]

    def values(self) -> dict[str, Any]:
        """What an engine is started with, by the names of its options."""
        choice = self.choice
        values = choice.setting.values(QuantConfig.parse(choice.quant))
        return {**values, "window": choice.window, "segment": choice.segment}

    def finding(self) -> str:
        """What the choice loses, and on what, in words."""
        data, loss = self.data, self.choice.loss
        if data.metric == KLD:
            return f"mean KL {loss:.4f} on {data.samples} texts of {data.source}"
        return f"loss {loss:.2%} on {data.samples} samples of {data.source}"

    def write(self, path: Path) -> None:
        """Write it.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            path.write_text(
                HEADER + tomli_w.dumps(self.model_dump(exclude_none=True)), encoding="utf-8"
            )
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def read(path: Path) -> Calibration:
    """Read a file.

    Raises:
        ConfigError: it is not there, or no calibration.
    """
    try:
        return Calibration.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --calibration {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--calibration {path} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"--calibration {path} is no file of diffkv calibrate: {place}: {first['msg']}"
        ) from None


def model_digest(config: Path) -> str:
    """SHA-256 of what a model's config.json says, in an order of its own.

    Raises:
        ConfigError: the file is not JSON.
    """
    try:
        values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {config}: {error}") from None
    kept = {key: value for key, value in values.items() if key not in IGNORED_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
