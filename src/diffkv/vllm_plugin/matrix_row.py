"""A line of the table of what works with DiffKV."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "FAMILIES",
    "NOT_TRIED",
    "REFUSALS",
    "REFUSED",
    "TESTS",
    "TRIED",
    "WITHOUT",
    "WORKS",
    "Row",
]

WORKS, REFUSED = "works", "refused"
TRIED, NOT_TRIED = "tried", "not tried"
WITHOUT = "serve this model without DiffKV"

TESTS = "tests/vllm_plugin/"
FAMILIES = (
    f"{TESTS}test_models.py::test_lossless_tokens_equal_stock",
    f"{TESTS}test_models.py::test_lossy_drift_is_bounded_and_counts_are_right",
)
REFUSALS = ("tests/test_support_matrix.py::test_refusals",)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        area: models, weights, features, parallelism or versions.
        feature: its name on the page.
        status: works, refused, turned off, tried or not tried.
        why: the reason, or a note.
        change: the user's alternative, where it is refused.
        tests: tests that run it, each `file::function`.
        asked: test of a vLLM configuration for a refused feature; None where another check
            refuses it: vLLM's own, a flag of `diffkv serve`, or `layer_argument`.
        words: name in the refusal, formatted with the configuration as `config`; `feature` if empty.
        layer_argument: argument of vLLM's attention layers that a model uses for it.
    """

    area: str
    feature: str
    status: str
    why: str = ""
    change: str = ""
    tests: tuple[str, ...] = ()
    asked: Callable[[Any], bool] | None = None
    words: str = ""
    layer_argument: str | None = None

    def refusal(self, vllm_config: Any) -> str:
        """The line that a user gets."""
        what = (self.words or self.feature).format(config=vllm_config)
        return f"DiffKV does not support {what}: {self.change}"
