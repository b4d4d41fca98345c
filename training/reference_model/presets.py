"""The models that ship: sizes, shares of tasks, and schedule of each, by name."""

from collections.abc import Mapping
from dataclasses import dataclass

from model import ModelConfig
from vocabulary import VOCABULARY


@dataclass(frozen=True)
class Preset:
    """One model.

    Attributes:
        config: its sizes.
        shares: of each task in training, see `streams.TASKS`.
        schedule: `length:batch:steps,...`.
    """

    config: ModelConfig
    shares: Mapping[str, float]
    schedule: str


PRESETS = {
    "reference": Preset(
        ModelConfig(len(VOCABULARY)),
        {"recall": 0.35, "needle": 0.1, "chain": 0.2, "copy": 0.1, "sum": 0.1, "list": 0.15},
        "64:32:220,128:32:80,256:16:130,512:8:220,1024:4:300,2048:2:120",
    ),
    "reference-128": Preset(
        ModelConfig(len(VOCABULARY), num_layers=4, head_dim=128),
        {
            "recall": 0.18,
            "needle": 0.04,
            "chain": 0.16,
            "copy": 0.06,
            "sum": 0.06,
            "list": 0.1,
            "pairs": 0.18,
            "pair_chain": 0.16,
            "far_needle": 0.06,
        },
        "64:256:400,128:128:400,256:128:800,512:64:1000,1024:32:1800,2048:16:1400",
    ),
}
