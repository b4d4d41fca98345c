"""Reads result files: runs of `diffkv eval`, and what `diffkv inspect --json` shows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from diffkv.lab.evaluation.results import Run
from diffkv.quant import ConfigError

__all__ = ["Heads", "Loaded", "read"]

Parsed = TypeVar("Parsed", bound=BaseModel)


class Heads(BaseModel):
    """What each layer and head kept, of `diffkv inspect --json`; the fields that are drawn.

    Attributes:
        model: as it was named.
        quant: text form of the formats.
        alpha_high: threshold.
        alpha_low: threshold.
        window: recent tokens that stay high.
        num_tokens: of all prompts.
        shares: of each tier, of tokens, [num_layers][num_kv_heads].
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    model: str
    quant: str
    alpha_high: float
    alpha_low: float
    window: int
    num_tokens: int
    shares: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Loaded:
    """Everything that the files hold, in their order."""

    runs: list[Run]
    heads: list[Heads]


def read(paths: Sequence[Path]) -> Loaded:
    """Read files of one JSON object, or of one a line.

    Raises:
        ConfigError: a file that cannot be read or holds something else; the same run twice.
    """
    runs: list[Run] = []
    heads: list[Heads] = []
    seen: dict[str, Path] = {}
    for path in paths:
        for row in _objects(path):
            if "shares" in row:
                heads.append(_parse(Heads, row, path))
                continue
            run = _parse(Run, row, path)
            key = run.model_dump_json(exclude={"seconds", "provenance"})
            if key in seen:
                raise ConfigError(f"{path} holds the same result as {seen[key]}: name it once")
            seen[key] = path
            runs.append(run)
    return Loaded(runs, heads)


def _objects(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    try:
        found = [json.loads(text)]
    except ValueError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON, nor one JSON object a line: {error}") from None
    if not found or not all(isinstance(row, dict) for row in found):
        raise ConfigError(f"{path} holds no JSON object")
    return found


def _parse(kind: type[Parsed], row: dict[str, Any], path: Path) -> Parsed:
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path} is no result of diffkv eval --json or diffkv inspect --json: {place}: "
            f"{first['msg']}"
        ) from None
