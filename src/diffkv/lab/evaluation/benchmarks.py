"""The real benchmarks as data: which of lm-evaluation-harness's tasks, and with what settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from diffkv.quant import ConfigError

__all__ = ["Benchmark", "find", "read_all"]

YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness and its settings; what is None is left to the task.

    Attributes:
        name: ours.
        task: the harness's name of a task or a group, or a task's own configuration.
        metric: (metric, filter) of the sample's score; None takes the only one that the task has.
        num_fewshot: examples in the prompt.
        max_tokens: longest answer.
        sampling: arguments of vLLM's SamplingParams; greedy if empty.
        chat: whether the model's chat template is applied.
        rounds: how often each question is asked.
        runs_code: whether answers are executed.
        source: where the settings come from.
    """

    name: str
    task: str | dict[str, Any]
    metric: tuple[str, str] | None = None
    num_fewshot: int | None = None
    max_tokens: int | None = None
    sampling: dict[str, float] = field(default_factory=dict)
    chat: bool = False
    rounds: int = 1
    runs_code: bool = False
    source: str = ""


def read_all(thinking: bool = False) -> dict[str, Benchmark]:
    """The benchmarks of `benchmarks.yaml` by name.

    Args:
        thinking: whether for a model that thinks before it answers.
    """
    text = (files("diffkv.lab.evaluation") / "benchmarks.yaml").read_text(encoding="utf-8")
    benchmarks = {}
    for name, entry in yaml.safe_load(text).items():
        when_thinking = entry.pop("thinking", {})
        values = {**entry, **(when_thinking if thinking else {})}
        values["metric"] = tuple(values["metric"])
        benchmarks[name] = Benchmark(name=name, **values)
    return benchmarks


def find(names: Sequence[str], thinking: bool = False) -> list[Benchmark]:
    """The benchmarks of some names.

    Args:
        names: ours, or files of task configurations (*.yaml). Any other task of the harness goes by
            `harness:NAME` or `harness:NAME:METRIC/FILTER`, with the task's own settings.
        thinking: whether for a model that thinks before it answers.

    Raises:
        ConfigError: an unknown name, or a file that is no task.
    """
    known = read_all(thinking)
    found = []
    for name in names:
        if name in known:
            found.append(known[name])
        elif name.startswith("harness:"):
            _, task, *metric = name.split(":", 2)
            pair = metric[0].partition("/") if metric else None
            found.append(Benchmark(name, task, (pair[0], pair[2] or "none") if pair else None))
        elif name.endswith(YAML_SUFFIXES):
            found.append(_from_file(Path(name)))
        else:
            close = get_close_matches(name, known, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"unknown task {name!r}: {meant}There are {', '.join(known)}, a task's file "
                f"(*.yaml), or harness:NAME for any other task of lm-evaluation-harness"
            )
    return found


def _from_file(path: Path) -> Benchmark:
    """A task of a file; relative paths of its data are relative to the file."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(path)
    except (OSError, ValueError, yaml.YAMLError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the task {path}: {reason}") from None
    if "task" not in config or isinstance(config["task"], list):
        raise ConfigError(f"{path} is not the configuration of a task: it has no line 'task: NAME'")
    arguments = dict(config.get("dataset_kwargs") or {})
    if "data_files" in arguments:
        arguments["data_files"] = _absolute(arguments["data_files"], path.resolve().parent)
        config["dataset_kwargs"] = arguments
    return Benchmark(config["task"], config, runs_code=bool(config.get("unsafe_code")))


def _absolute(value: Any, folder: Path) -> Any:
    """Paths of a `data_files`, which is a path, a list of them, or a mapping to either."""
    if isinstance(value, dict):
        return {key: _absolute(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_absolute(each, folder) for each in value]
    return value if "://" in value else str(folder / value)
