"""The models that ship: sizes, tasks, and schedule of each, by name."""

from collections.abc import Mapping
from dataclasses import dataclass

from hard_tasks import HARD_TASK_SHARES, HARD_TASKS
from model import ModelConfig
from tasks import TASK_SHARES, TASKS, VOCAB_SIZE, TaskFunction


@dataclass(frozen=True)
class Preset:
    """One model.

    Attributes:
        config: its sizes.
        tasks: a function for each task, by name.
        shares: of each task in training.
        schedule: `length:batch:steps,...`.
    """

    config: ModelConfig
    tasks: Mapping[str, TaskFunction]
    shares: Mapping[str, float]
    schedule: str


PRESETS = {
    "reference": Preset(
        ModelConfig(VOCAB_SIZE),
        TASKS,
        TASK_SHARES,
        "64:32:220,128:32:80,256:16:130,512:8:220,1024:4:300,2048:2:120",
    ),
    "reference-128": Preset(
        ModelConfig(VOCAB_SIZE, num_layers=4, head_dim=128),
        HARD_TASKS,
        HARD_TASK_SHARES,
        "64:256:400,128:128:400,256:128:800,512:64:1000,1024:32:1800,2048:16:1400",
    ),
}
