"""The suite `kld` through vLLM: its own caches and DiffKV's, on the same texts, in the same way.

Every cache reads the same tokens after the same prompts, and each next-token distribution is compared
with that of full precision: the model in float32 with vLLM's own cache. What follows the prompt directly
is left out, for it comes from exact attention.
"""

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from diffkv.lab.evaluation.divergence import Divergence, compare, first_difference
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.front.forcing import (
    ForcedEngine,
    Script,
    Spent,
    forced_engine,
    vllm_version,
)
from diffkv.vllm_plugin.options import Options

__all__ = ["CacheDistances", "ComparedCache", "Distance", "KldJob", "Reading", "rows"]


@dataclass(frozen=True)
class ComparedCache:
    """A cache to compare with full precision.

    Attributes:
        name: in tables and files.
        arguments: of vLLM's engine, beside those that all share.
        options: DiffKV's; None for vLLM's own.
    """

    name: str
    arguments: dict[str, Any]
    options: Options | None = None


@dataclass(frozen=True)
class Reading:
    """Texts to read.

    Attributes:
        texts: token ids.
        steps: compared steps, at the end of each.
    """

    texts: list[list[int]]
    steps: int

    @property
    def prompts(self) -> list[list[int]]:
        """All of a text but its last tokens."""
        return [text[: -self.steps - 1] for text in self.texts]

    @property
    def tokens(self) -> list[list[int]]:
        """The last ones: each but the first is what a compared distribution is about."""
        return [text[-self.steps - 1 :] for text in self.texts]


class Distance(BaseModel):
    """Distances of one cache, over all texts or those of one length.

    Attributes:
        context: most tokens of the texts.
        n: texts.
        steps: compared steps, of all of them.
        kld_mean: of KL(full || cache), in nats.
        kld_median: likewise.
        kld_p99: its 99 % quantile.
        kld_p999: its 99.9 % quantile.
        same_top1: share of steps with the same most likely token.
        perplexity: of the texts' tokens.
        perplexity_full: likewise, full precision.
        first_divergence: tokens of an answer before the first one that full precision would not have
            chosen, mean over answers of as many tokens as a text has steps.
        diverged: share of answers with such a token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    context: int = Field(gt=0)
    n: int = Field(gt=0)
    steps: int = Field(gt=0)
    kld_mean: float = Field(ge=0)
    kld_median: float = Field(ge=0)
    kld_p99: float = Field(ge=0)
    kld_p999: float = Field(ge=0)
    same_top1: float = Field(ge=0, le=1)
    perplexity: float = Field(ge=1)
    perplexity_full: float = Field(ge=1)
    first_divergence: float = Field(ge=0)
    diverged: float = Field(ge=0, le=1)

    @classmethod
    def of(cls, context: int, forced: Divergence, free: Divergence) -> "Distance":
        """Sum up.

        Args:
            context: most tokens of the texts.
            forced: on the texts' own tokens.
            free: on the answers of full precision.
        """
        first = first_difference(free.same)
        return cls(
            context=context,
            n=len(forced.kld),
            steps=forced.kld.size,
            kld_mean=float(forced.kld.mean()),
            kld_median=float(np.median(forced.kld)),
            kld_p99=float(np.quantile(forced.kld, 0.99)),
            kld_p999=float(np.quantile(forced.kld, 0.999)),
            same_top1=float(forced.same.mean()),
            perplexity=math.exp(forced.nll.mean()),
            perplexity_full=math.exp(forced.nll_full.mean()),
            first_divergence=float(first.mean()),
            diverged=float((first < free.same.shape[1]).mean()),
        )


class CacheDistances(BaseModel):
    """A row of the result: one cache.

    Attributes:
        key: digest of everything that the row depends on.
        model: as it was named.
        cache: its name.
        settings: arguments of vLLM's engine and options of DiffKV.
        bytes_per_token: of all layers, whole pages or blocks, when the requests end.
        bf16_bytes_per_token: elements alone, in bf16.
        high: share of tokens in the high tier.
        low: likewise in the low tier.
        all_texts: distances over all texts.
        by_context: likewise, by the lengths of the texts.
        seconds: the row took, start of the engine included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    key: str
    model: str
    cache: str
    settings: dict[str, Any]
    bytes_per_token: float = Field(gt=0)
    bf16_bytes_per_token: int = Field(gt=0)
    high: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    all_texts: Distance
    by_context: list[Distance]
    seconds: float

    @property
    def ratio_bf16(self) -> float:
        """How many times fewer bytes than bf16."""
        return self.bf16_bytes_per_token / self.bytes_per_token


@dataclass(frozen=True)
class KldJob:
    """What is compared.

    Attributes:
        model: as it was named.
        arguments: of vLLM's engine that all caches share, the model's folder among them.
        caches: to compare.
        commit: of this checkout, on which rows of DiffKV's caches depend.
    """

    model: str
    arguments: dict[str, Any]
    caches: Sequence[ComparedCache]
    commit: str | None = None


Report = Callable[[str, int, int], None]
"""Is told of progress: name of the cache, scripts done, scripts in all."""


def rows(
    job: KldJob,
    read_texts: Callable[[ForcedEngine], Reading],
    known: Sequence[CacheDistances] = (),
    report: Report = lambda name, done, total: None,
    refused: Callable[[str, str], None] = lambda name, reason: None,
) -> Iterator[CacheDistances]:
    """Compare caches, one engine after the other; each row as soon as it is there.

    Args:
        job: what is compared.
        read_texts: makes the texts, with the tokenizer of the engine.
        known: rows of an earlier run: those of the same job are given back, not measured again.
        report: progress.
        refused: is told of a cache that this device has not, and why.

    Raises:
        ConfigError: full precision cannot be run, or a text does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="diffkv-kld-") as scratch:
        folder = Path(scratch)
        exact = {**job.arguments, "dtype": "float32"}
        with forced_engine(exact, None) as engine:
            reading = read_texts(engine)
            keys = {cache.name: _key(job, cache, reading) for cache in job.caches}
            by_key = {row.key: row for row in known}
            wanted = [cache for cache in job.caches if keys[cache.name] not in by_key]
            if wanted:
                answers = _read_full(engine, reading, folder, report)
        for cache in job.caches:
            if cache not in wanted:
                yield by_key[keys[cache.name]]
                continue
            start = time.perf_counter()
            try:
                compared = _read(job, cache, reading, answers, folder, report)
            except ConfigError as error:
                refused(cache.name, str(error))
                continue
            yield _row(job, cache, keys[cache.name], reading, *compared, start)


def _read_full(
    engine: ForcedEngine, reading: Reading, folder: Path, report: Report
) -> list[list[int]]:
    """Distributions of full precision on the texts and on its own answers; those answers."""
    scripts = [Script(*pair) for pair in zip(reading.prompts, reading.tokens, strict=True)]
    scripts += [Script(prompt, []) for prompt in reading.prompts]
    tokens, _ = engine.read(
        scripts,
        reading.steps + 1,
        folder / "full.npy",
        lambda done: report("full precision", done, len(scripts)),
    )
    return tokens[len(reading.texts) :]


def _read(
    job: KldJob,
    cache: ComparedCache,
    reading: Reading,
    answers: list[list[int]],
    folder: Path,
    report: Report,
) -> tuple[Divergence, Spent]:
    """Distances of one cache, of the texts and then of the answers."""
    followed = [*reading.tokens, *answers]
    scripts = [
        Script(prompt, tokens)
        for prompt, tokens in zip([*reading.prompts] * 2, followed, strict=True)
    ]
    with forced_engine({**job.arguments, **cache.arguments}, cache.options) as engine:
        _, spent = engine.read(
            scripts,
            reading.steps + 1,
            folder / "cache.npy",
            lambda done: report(cache.name, done, len(scripts)),
        )
    full, other = (np.load(folder / name, mmap_mode="r") for name in ("full.npy", "cache.npy"))
    compared = compare(full[:, 1:], other[:, 1:], [tokens[1:] for tokens in followed])
    return compared, spent


def _row(
    job: KldJob,
    cache: ComparedCache,
    key: str,
    reading: Reading,
    compared: Divergence,
    spent: Spent,
    start: float,
) -> CacheDistances:
    lengths = np.array([len(text) for text in reading.texts])

    def distance(chosen: np.ndarray, context: int) -> Distance:
        forced, free = (
            Divergence(*(values[half][chosen] for values in vars(compared).values()))
            for half in (slice(None, len(lengths)), slice(len(lengths), None))
        )
        return Distance.of(context, forced, free)

    contexts = [int(context) for context in np.unique(lengths)]
    return CacheDistances(
        key=key,
        model=job.model,
        cache=cache.name,
        settings=_settings(cache),
        bytes_per_token=spent.bytes_per_token,
        bf16_bytes_per_token=spent.bf16_bytes_per_token,
        high=spent.high,
        low=spent.low,
        all_texts=distance(lengths > 0, contexts[-1]),
        by_context=[distance(lengths == context, context) for context in contexts],
        seconds=time.perf_counter() - start,
    )


def _settings(cache: ComparedCache) -> dict[str, Any]:
    return {**cache.arguments, **({} if cache.options is None else cache.options.to_dict())}


def _key(job: KldJob, cache: ComparedCache, reading: Reading) -> str:
    ours = [] if cache.options is None else [job.commit]
    facts = [vllm_version(), job.model, _settings(cache), reading.texts, reading.steps, *ours]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
