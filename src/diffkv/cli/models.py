"""A model by name, for commands that need its sizes and no engine: a folder, or an id of the Hub."""

import contextlib
import importlib.util
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from diffkv.model_config import ModelConfig, stored_weight_bytes
from diffkv.quant import ConfigError

__all__ = ["Weights", "check_hub", "config_file", "load_config", "weights_of"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, and how they are known."""

    num_bytes: int
    source: str


def _hub_file(model: str, file: str) -> Path:
    """A file of a model on the Hub, from the local cache if it is there.

    Raises:
        ConfigError: it cannot be had.
    """
    if HUB_ID.fullmatch(model) is None:
        raise ConfigError(f"model {model} is neither a folder nor a model id (owner/name)")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"{model} is no folder, and reading a model id needs huggingface_hub: give a folder, or "
            f"pip install huggingface_hub"
        )
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _download(model, file)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _not_had(model, file, error) from None


def _download(model: str, file: str) -> Path:
    """Get a file, without a line for each retry."""
    from huggingface_hub import hf_hub_download

    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(model, file))
    finally:
        logger.setLevel(before)


def _not_had(model: str, file: str, error: Exception) -> ConfigError:
    reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    return ConfigError(f"cannot get {file} of {model} from the Hub: {reason}")


def check_hub(model: str) -> None:
    """Refuse the id of a model that is neither in the local cache nor within reach.

    For engines that load models themselves, and would try, retry and fail at length. What else may be
    wrong with an id is left to them: they know more places, and files of other names.

    Raises:
        ConfigError: says what could not be had.
    """
    if HUB_ID.fullmatch(model) is None or Path(model).exists():
        return
    if importlib.util.find_spec("huggingface_hub") is None or "VLLM_USE_MODELSCOPE" in os.environ:
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    with contextlib.suppress(HfHubHTTPError, EntryNotFoundError):
        try:
            _download(model, "config.json")
        except LocalEntryNotFoundError as error:
            raise _not_had(model, "config.json", error) from None


def config_file(model: str) -> Path:
    """Where a model's config.json is: in a folder, the file itself, or from the Hub.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(model).expanduser()
    if folder.is_file() and folder.suffix == ".json":
        return folder
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model folder {model} has no config.json: it holds no model")
        return folder / "config.json"
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"model folder {model} does not exist: give a folder or a model id")
    return _hub_file(model, "config.json")


def load_config(model: str) -> ModelConfig:
    """Read a model's config.json.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    file = config_file(model)
    is_file = Path(model).expanduser() == file
    return ModelConfig.read(file, str(file.parent.name or file) if is_file else model)


def weights_of(model: str, config: ModelConfig) -> Weights:
    """Bytes of the weights: of a folder's files if it has them, else by the architecture's formula.

    Raises:
        ConfigError: a file of weights is damaged; or there is none, and no formula either.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        stored = stored_weight_bytes(folder)
        if stored is not None:
            return Weights(stored, "the weights' files")
    if config.unsized:
        return Weights(_indexed_bytes(model, config.unsized), "the index of the weights' files")
    parameters = f"{config.num_parameters:,} parameters in {config.weight_bits} bits"
    return Weights(config.estimated_weight_bytes, f"estimated: {parameters}")


def _indexed_bytes(model: str, unsized: str) -> int:
    """Bytes of a model's weights by their index on the Hub, where they cannot be estimated.

    Raises:
        ConfigError: there is none.
    """
    try:
        index = json.loads(_hub_file(model, "model.safetensors.index.json").read_text())
        return int(index["metadata"]["total_size"])
    except (ConfigError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{model} has {unsized}, and config.json does not say how large the weights are: give a "
            f"folder that has them"
        ) from None
