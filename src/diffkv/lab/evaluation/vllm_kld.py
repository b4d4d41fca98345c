"""The suite `kld` through vLLM: its own caches and DiffKV's, on the same texts, in the same way.

Full precision is the model in float32 with vLLM's own cache.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffkv.lab.evaluation.distances import Reading, Report, compare_caches, scores_of
from diffkv.lab.evaluation.divergence import Divergence, compare, first_difference, mapped
from diffkv.lab.evaluation.engine import CacheSpec
from diffkv.lab.evaluation.results import ALL_TEXTS, DISTANCES, DistanceScore
from diffkv.lab.rows import Row, Writer
from diffkv.use import CacheUse
from diffkv.vllm_plugin.front.forcing import ForcedEngine, Script, forced_engine
from diffkv.vllm_plugin.options import Options

__all__ = ["ComparedCache", "KldJob", "rows"]


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

    def settings(self, model: str) -> dict[str, Any]:
        """Its arguments and options by name, defaults too, as rows have them."""
        if self.options is None:
            return self.arguments
        return {**self.arguments, **CacheSpec.of(self.options).method(model, "vllm").case()}


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
            **cache.settings(self.model),
            **reading.case(),
        }


def rows(
    job: KldJob,
    read_texts: Callable[[ForcedEngine], Reading],
    writer: Writer,
    report: Report = lambda name, done, total: None,
) -> Iterator[Row]:
    """Compare caches, one engine after the other; see `distances.compare_caches`.

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
        answers: list[list[int]] = []
        exact = {**job.arguments, "dtype": "float32"}
        with forced_engine(exact, None) as engine:
            reading = read_texts(engine)
            asked = [(cache, job.case(cache, reading)) for cache in job.caches]
            if any(writer.find(DISTANCES, case) is None for _, case in asked):
                answers = _read_full(engine, reading, folder, report)
        yield from compare_caches(
            asked, writer, lambda cache: _read(job, cache, reading, answers, folder, report)
        )


def _read_full(
    engine: ForcedEngine, reading: Reading, folder: Path, report: Report
) -> list[list[int]]:
    """Distributions of full precision on the texts; its own answers to their prompts."""
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
) -> list[DistanceScore]:
    """Scores of one cache, which reads the texts and follows the answers."""
    followed = [*reading.tokens, *answers]
    scripts = [
        Script(prompt, tokens)
        for prompt, tokens in zip([*reading.prompts] * 2, followed, strict=True)
    ]
    lengths, num = [len(text) for text in reading.texts] * 2, len(reading.texts)
    uses: dict[int | str, CacheUse] = {ALL_TEXTS: CacheUse()}
    other: dict[int, torch.Tensor] = {}
    with forced_engine({**job.arguments, **cache.arguments}, cache.options) as engine:
        for length in sorted(set(lengths)):  # in turns, so that each has bytes of its own
            some = [i for i, each in enumerate(lengths) if each == length]
            file, begun = folder / f"cache-{length}.npy", len(other)

            def progress(done: int, begun: int = begun) -> None:
                report(cache.name, begun + done, len(scripts))

            _, uses[length] = engine.read(
                [scripts[i] for i in some], reading.steps + 1, file, progress
            )
            uses[ALL_TEXTS] += uses[length]
            other |= zip(some, mapped(file)[:, 1:], strict=True)
    full, about = mapped(folder / "full.npy")[:, 1:], torch.tensor(followed)[:, 1:]
    forced = Divergence.join(
        [compare(full[[i]], other[i][None], about[[i]]) for i in range(num)], axis=0
    )
    same = torch.stack([other[i].argmax(-1) == about[i] for i in range(num, 2 * num)])
    return scores_of(reading, forced, first_difference(same.numpy()), uses.__getitem__)
