"""A model by name, for commands that need its sizes and no engine: a folder, or an id of the Hub."""

import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from diffkv.model_config import ModelConfig, stored_weight_bytes
from diffkv.quant import ConfigError

__all__ = ["Weights", "config_file", "load_config", "weights_of"]

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
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each of its retries
    try:
        return Path(hf_hub_download(model, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ConfigError(f"cannot get {file} of {model} from the Hub: {reason}") from None


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
        ConfigError: a file of weights is damaged.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        stored = stored_weight_bytes(folder)
        if stored is not None:
            return Weights(stored, "the weights' files")
    parameters = f"{config.num_parameters:,} parameters in {config.weight_bits} bits"
    return Weights(config.estimated_weight_bytes, f"estimated: {parameters}")
