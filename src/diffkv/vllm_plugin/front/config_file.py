"""Flags from a YAML file (`--config FILE`), in a command whose flags are only partly vLLM's."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from diffkv.quant import ConfigError
from diffkv.vllm_plugin.options import Options

__all__ = ["with_config_file"]

FLAG = "--config"


def with_config_file(parser: Any, flags: Sequence[str]) -> list[str]:
    """The flags with those of a configuration file first, so that the command line overrides them.

    vLLM would put them before all others, where what the command itself sets replaces them silently.

    Args:
        parser: vLLM's, which knows how a line becomes a flag.
        flags: the command line's.

    Raises:
        ConfigError: a file that cannot be read, a line that stands there twice, or one that is set by
            an option or argument of the command.
    """
    file, rest = _split(flags)
    if file is None:
        return rest
    lines = _lines(file)
    ours = {field.name.replace("_", "-") for field in fields(Options)} | {"preset", "calibration"}
    for name in lines:
        if name in ("model", "model-tag"):
            raise ConfigError(f"{FLAG} {file} sets {name}: name the model on the command line only")
        if name in ours:
            raise ConfigError(
                f"{FLAG} {file} sets {name}, which is DiffKV's: give --{name} instead"
            )
        if name == FLAG.removeprefix("--"):
            raise ConfigError(f"{FLAG} {file} names another file: put everything into one")
    for name in sorted(lines):
        if "no-" + name in lines:
            raise ConfigError(f"{FLAG} {file} has both {name} and no-{name}: keep one")
    return [*parser.load_config_file(str(file)), *rest]


def _split(flags: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that is named, and the other flags."""
    files, rest, remaining = [], [], iter(flags)
    for flag in remaining:
        name, equals, value = flag.partition("=")
        if name != FLAG:
            rest.append(flag)
            continue
        file = value if equals else next(remaining, None)
        if not file:
            raise ConfigError(f"{FLAG} needs the name of a YAML file")
        files.append(Path(file))
    if len(files) > 1:
        raise ConfigError(f"{FLAG} is given {len(files)} times: put everything into one file")
    return (files[0] if files else None), rest


def _lines(file: Path) -> list[str]:
    """Names of the file's lines, with dashes."""
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{FLAG} {file} must be a YAML file, *.yaml or *.yml")
    try:
        tree = yaml.compose(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {FLAG} {file}: {error}") from None
    except yaml.YAMLError as error:
        problem = str(error).replace("\n", " ")
        raise ConfigError(f"{FLAG} {file} is not YAML: {problem}") from None
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{FLAG} {file} must hold lines of the form 'port: 8001'")
    names = [str(key.value).replace("_", "-") for key, _ in tree.value]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{FLAG} {file} sets {name} {names.count(name)} times: keep one")
    return names
