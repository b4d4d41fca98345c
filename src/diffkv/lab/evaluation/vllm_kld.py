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

from diffkv.lab.evaluation.divergence import Divergence, compare, first_difference
from diffkv.lab.evaluation.results import ALL_TEXTS, DISTANCES, DistanceScore, figures
from diffkv.lab.rows import Row, Writer
from diffkv.quant import ConfigError
from diffkv.use import CacheUse
from diffkv.vllm_plugin.front.forcing import ForcedEngine, Script, forced_engine
from diffkv.vllm_plugin.options import Options

__all__ = ["ComparedCache", "KldJob", "Reading", "rows"]

DIGEST_LENGTH = 12


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

    @property
    def settings(self) -> dict[str, Any]:
        """Its arguments and options by name, as rows have them."""
        return {**self.arguments, **({} if self.options is None else self.options.to_dict())}


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

    @property
    def contexts(self) -> list[int | str]:
        """The cells of a row: all texts, and each length if there are several."""
        lengths = sorted({len(text) for text in self.texts})
        return [ALL_TEXTS, *(lengths if len(lengths) > 1 else ())]

    def case(self) -> dict[str, Any]:
        """What is read, in a row's case."""
        digest = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()
        return {
            "contexts": self.contexts,
            "texts": len(self.texts),
            "sha256": digest[:DIGEST_LENGTH],
            "max_steps": self.steps,
        }


@dataclass(frozen=True)
class KldJob:
    """What is compared.

    Attributes:
        model: as it was named.
        arguments: of vLLM's engine that all caches share, the model's folder among them.
        caches: to compare.
    """

    model: str
    arguments: dict[str, Any]
    caches: Sequence[ComparedCache]

    def case(self, cache: ComparedCache, reading: Reading) -> dict[str, Any]:
        """What is asked of one of the caches, as rows have it."""
        return {
            "model": self.model,
            "engine": "vllm",
            "suite": "kld",
            "dtype": self.arguments["dtype"],
            "cache": cache.name,
            **cache.settings,
            **reading.case(),
        }


Report = Callable[[str, int, int], None]
"""Is told of progress: name of the cache, scripts done, scripts in all."""


def rows(
    job: KldJob,
    read_texts: Callable[[ForcedEngine], Reading],
    writer: Writer,
    report: Report = lambda name, done, total: None,
) -> Iterator[Row]:
    """Compare caches, one engine after the other. A cache that cannot be run gets a row with the error.

    Args:
        job: what is compared.
        read_texts: makes the texts, with the tokenizer of the engine.
        writer: of the rows; those that it has already are not measured again.
        report: progress.

    Raises:
        ConfigError: full precision cannot be run, or a text does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="diffkv-kld-") as scratch:
        folder = Path(scratch)
        exact = {**job.arguments, "dtype": "float32"}
        with forced_engine(exact, None) as engine:
            reading = read_texts(engine)
            asked = [(cache, job.case(cache, reading)) for cache in job.caches]
            if any(writer.find(DISTANCES, case) is None for _, case in asked):
                answers = _read_full(engine, reading, folder, report)
        for cache, case in asked:
            row = writer.find(DISTANCES, case)
            if row is None:
                start = time.perf_counter()
                try:
                    found = _scores(reading, *_read(job, cache, reading, answers, folder, report))
                except ConfigError as error:
                    row = writer.add(DISTANCES, case, {}, error=str(error))
                else:
                    seconds = round(time.perf_counter() - start, 1)
                    row = writer.add(
                        DISTANCES, case, {**figures(DISTANCES, found), "seconds": seconds}
                    )
            yield row


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
) -> tuple[Divergence, CacheUse]:
    """Distances of one cache, of the texts and then of the answers."""
    followed = [*reading.tokens, *answers]
    scripts = [
        Script(prompt, tokens)
        for prompt, tokens in zip([*reading.prompts] * 2, followed, strict=True)
    ]
    with forced_engine({**job.arguments, **cache.arguments}, cache.options) as engine:
        _, use = engine.read(
            scripts,
            reading.steps + 1,
            folder / "cache.npy",
            lambda done: report(cache.name, done, len(scripts)),
        )
    full, other = (np.load(folder / name, mmap_mode="r") for name in ("full.npy", "cache.npy"))
    compared = compare(full[:, 1:], other[:, 1:], [tokens[1:] for tokens in followed])
    return compared, use


def _scores(reading: Reading, compared: Divergence, use: CacheUse) -> list[DistanceScore]:
    """A score for each cell.

    Args:
        reading: what was read.
        compared: [2 * texts, steps] of the texts, then of the answers.
        use: of all of them.
    """
    lengths = np.array([len(text) for text in reading.texts])
    found = []
    for context in reading.contexts:
        chosen = lengths > 0 if context == ALL_TEXTS else lengths == context
        forced, free = (
            Divergence(*(values[half][chosen] for values in vars(compared).values()))
            for half in (slice(None, len(lengths)), slice(len(lengths), None))
        )
        first = first_difference(free.same)
        found.append(
            DistanceScore(
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
                **use.per_token(),
            )
        )
    return found
