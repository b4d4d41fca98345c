"""What an evaluation prints, as a schema: one JSON object for each run."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["KldRow", "Provenance", "Run", "TaskRow", "Use"]

Share = Field(ge=0, le=1)


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Provenance(_Row):
    """Where a result comes from.

    Attributes:
        command: the command line, as typed.
        commit: of the checkout that ran; None outside of one. `-dirty` is appended if it was changed.
        versions: of diffkv, torch, transformers, and the engine if it is another.
        device: in words.
    """

    command: str
    commit: str | None
    versions: dict[str, str]
    device: str


class Use(_Row):
    """What the cache spent, when the requests end; means over requests, layers and heads.

    Attributes:
        bytes_per_token: whole pages, half-empty ones included, and the page-table entries of all heads
            and layers, over tokens of the request.
        ratio_bf16: bytes of a bf16 cache over `bytes_per_token`.
        nominal_ratio_bf16: by bits of kept codes alone. Never to be shown without the other one.
        high: share of a request's tokens in the high tier.
        low: likewise in the low tier.
        dropped: share of tokens that are gone.
    """

    bytes_per_token: float = Field(gt=0)
    ratio_bf16: float = Field(gt=0)
    nominal_ratio_bf16: float = Field(gt=0)
    high: float = Share
    low: float = Share
    dropped: float = Share


class TaskRow(Use):
    """One task in one setting.

    Attributes:
        task: name of the task.
        setting: easy: the question ends the prompt. hard: it comes when the prompt is compressed.
            benchmark: the prompt of a task of lm-evaluation-harness.
        n: samples.
        accuracy: mean share of right answer words of a sample.
        accuracy_full: of the same samples through the full-precision cache.
        exact: share of samples whose scored words are all right.
        exact_full: likewise, full precision.
        ci95_difference: 95 % interval of accuracy - accuracy_full, paired, bootstrapped over samples.
    """

    task: str
    setting: Literal["easy", "hard", "benchmark"]
    n: int = Field(gt=0)
    accuracy: float = Share
    accuracy_full: float = Share
    exact: float = Share
    exact_full: float = Share
    ci95_difference: tuple[float, float]


class KldRow(Use):
    """Distance of the next-token distributions from full precision, over texts.

    Attributes:
        mode: forced: both caches read the same text. free: each continues with its own tokens, and
            only steps before the first different token are compared.
        n: texts.
        steps: compared steps.
        kld_mean: of KL(full || compressed), in nats.
        kld_median: likewise.
        kld_p999: its 99.9 % quantile.
        same_top1: share of steps with the same most likely token.
        first_divergence: mean step of the first different token; steps of the text where there is none.
        diverged: share of texts with a different token.
    """

    mode: Literal["forced", "free"]
    n: int = Field(gt=0)
    steps: int = Field(gt=0)
    kld_mean: float = Field(ge=0)
    kld_median: float = Field(ge=0)
    kld_p999: float = Field(ge=0)
    same_top1: float = Share
    first_divergence: float = Field(ge=0)
    diverged: float = Share


class Run(_Row):
    """One evaluation: a model, a cache, a suite, a seed.

    Attributes:
        model: as it was named.
        engine: hf or vllm.
        quant: text form of the formats.
        policy: text form of the policy.
        alpha_high: threshold.
        alpha_low: threshold.
        window: recent tokens that stay high.
        rotate: what keys and values were rotated by before they were quantised.
        seed: of the samples.
        suite: synth or kld.
        tasks: rows of the suite synth.
        kld: rows of the suite kld.
        seconds: the run took.
        provenance: where it comes from.
    """

    model: str
    engine: Literal["hf", "vllm"]
    quant: str
    policy: str
    alpha_high: float
    alpha_low: float
    window: int
    rotate: str = "none"
    seed: int
    suite: str
    tasks: list[TaskRow] = []
    kld: list[KldRow] = []
    seconds: float
    provenance: Provenance
