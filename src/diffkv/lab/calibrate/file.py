"""The file that a calibration writes: what was chosen, for which model, by which data, and the curve."""

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffkv.lab.calibrate.search import Point
from diffkv.policies import PAPER, with_distinct
from diffkv.quant import ConfigError, QuantConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Calibration", "Choice", "CurvePoint", "Data", "Model", "Source", "model_digest", "read"]

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
    """What it was asked: a name, how many questions, the seed that chose them, and their digest."""

    source: str
    samples: int
    seed: int
    sha256: str
    metric: str


class Source(_Table):
    """How to do it again."""

    command: str
    versions: dict[str, str]


class CurvePoint(_Table):
    """One setting that was measured.

    Attributes:
        alpha_high: threshold.
        alpha_low: threshold.
        distinct: share of a prompt that stays by its keys; 1 drops none.
        samples: it was measured on; a setting is given up once it is surely too bad.
        loss: mean over the samples.
        loss_ci95: its 95 % interval, bootstrapped.
        bytes_per_token: real bytes, whole pages and tables.
        ratio_bf16: bytes of a bf16 cache over them.
        high: share of tokens in the high tier.
        low: share in the low tier.
        dropped: share that is gone.
        accepted: whether the loss on all samples is within the limit.
    """

    alpha_high: float = Field(ge=0)
    alpha_low: float = Field(ge=0)
    distinct: float = Field(default=1.0, gt=0, le=1)
    samples: int
    loss: float
    loss_ci95: tuple[float, float]
    bytes_per_token: float
    ratio_bf16: float
    high: float
    low: float
    dropped: float
    accepted: bool

    @classmethod
    def of(cls, point: Point, **more: Any) -> "Self":
        """A point of the search, in the file's terms, with values of a subclass."""
        thresholds, spent = point.setting.thresholds, point.use.per_token()
        del spent["nominal_ratio_bf16"]
        return cls(
            alpha_high=thresholds.alpha_high,
            alpha_low=thresholds.alpha_low,
            distinct=point.setting.distinct,
            samples=point.n,
            loss=point.loss,
            loss_ci95=point.ci95,
            accepted=point.accepted,
            **spent,
            **more,
        )


class Choice(CurvePoint):
    """The point that was chosen, and what an engine needs beside it."""

    quant: str
    window: int


class Calibration(_Table):
    """The whole file."""

    format: Literal[1] = 1
    max_loss: float
    model: Model
    data: Data
    choice: Choice
    source: Source
    curve: list[CurvePoint]

    def values(self) -> dict[str, Any]:
        """What an engine is started with, by the names of its options."""
        choice = self.choice
        values = {
            "quant": choice.quant,
            "alpha_low": choice.alpha_low,
            "window": choice.window,
            "policy": with_distinct(PAPER.text, choice.distinct),
        }
        has_low = QuantConfig.parse(choice.quant).has_low
        return {**values, "alpha_high": choice.alpha_high} if has_low else values

    def write(self, path: Path) -> None:
        """Write it.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            path.write_text(HEADER + tomli_w.dumps(self.model_dump()), encoding="utf-8")
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
