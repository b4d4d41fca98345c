"""The suite `kld` in transformers: DiffKV's caches and other engines' formats, on the same texts.

Full precision is the model with a dense cache in its own dtype; it reads once for all others.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkv.hf import DiffKVHFCache
from diffkv.lab.evaluation.dense_cache import DenseCache
from diffkv.lab.evaluation.distances import Reading, Report, compare_caches, scores_of
from diffkv.lab.evaluation.divergence import Divergence, compare
from diffkv.lab.evaluation.engine import CacheSpec, NamedCache
from diffkv.lab.evaluation.hf_runs import HFModel
from diffkv.lab.evaluation.results import ALL_TEXTS, DistanceScore
from diffkv.lab.rows import Row, Writer
from diffkv.use import CacheUse

__all__ = ["Comparison", "rows"]


@dataclass(frozen=True)
class _Part:
    """Texts of one length that are read together, and what full precision says of them.

    Attributes:
        numbers: of the texts.
        prompts: [texts, tokens].
        tokens: [texts, steps + 1] what follows.
        log_probs: [texts, steps, vocabulary] after each of these but the last.
        answers: [texts, steps + 1] what full precision says instead.
    """

    numbers: list[int]
    prompts: Tensor
    tokens: Tensor
    log_probs: Tensor
    answers: Tensor


def rows(
    engine: HFModel,
    model: str,
    caches: Sequence[NamedCache],
    reading: Reading,
    writer: Writer,
    report: Report = lambda name, done, total: None,
) -> Iterator[Row]:
    """Compare caches, one after the other; see `distances.compare_caches`.

    Args:
        engine: reads.
        model: its name.
        caches: to compare.
        reading: what is read.
        writer: of the rows; those that it has already are not measured again.
        report: progress.
    """
    asked = [(each, {**_case(each, model, engine), **reading.case()}) for each in caches]
    yield from compare_caches(asked, writer, Comparison(engine, reading, report))


class Comparison:
    """Compares one cache after the other; full precision reads once, when the first is asked for.

    Args:
        engine: reads.
        reading: what is read.
        report: progress.
    """

    def __init__(
        self,
        engine: HFModel,
        reading: Reading,
        report: Report = lambda name, done, total: None,
    ) -> None:
        self._engine = engine
        self._reading = reading
        self._report = report
        self._parts: list[_Part] = []

    def __call__(self, cache: NamedCache) -> list[DistanceScore]:
        """A score for each cell of `Reading.contexts`."""
        if not self._parts:
            self._parts = _read_full(self._engine, self._reading, self._report)
        return _read(self._engine, cache, self._reading, self._parts, self._report)


def _case(cache: NamedCache, model: str, engine: HFModel) -> dict[str, Any]:
    """A cache, a model and its dtype as rows name them."""
    settings = {}
    if isinstance(cache.kind, CacheSpec):
        settings = cache.kind.method(model, engine.name).case()
    named = {"model": model, "engine": engine.name, "suite": "kld", "dtype": engine.dtype}
    return {**named, "cache": cache.name, **settings}


def _read_full(engine: HFModel, reading: Reading, report: Report) -> list[_Part]:
    """What full precision says of all texts, and to their prompts."""
    parts: list[_Part] = []
    for numbers in engine.together([len(text) for text in reading.texts]):
        prompts, tokens = (
            torch.tensor([rows[i] for i in numbers], device=engine.model.device)
            for rows in (reading.prompts, reading.tokens)
        )
        cache = engine.full_cache(prompts.shape[1] + reading.steps)
        first = engine.forward(cache, prompts).argmax(-1)
        branch = copy.deepcopy(cache)
        log_probs = torch.cat([_log_probs(logits) for logits in _follow(engine, cache, tokens)], 1)
        answers = _answer(engine, branch, first, reading.steps)
        parts.append(_Part(numbers, prompts, tokens, log_probs, answers))
        report("full precision", sum(len(p.numbers) for p in parts), len(reading.texts))
    return parts


def _read(
    engine: HFModel, cache: NamedCache, reading: Reading, parts: Sequence[_Part], report: Report
) -> list[DistanceScore]:
    """Scores of one cache, which reads the texts and follows the answers of full precision."""
    found: dict[int, Divergence] = {}
    first = np.full(len(reading.texts), reading.steps)
    uses: dict[int | str, CacheUse] = {}
    for part in parts:
        mine = engine.make_cache(cache.kind, part.prompts.shape[1] + reading.steps)
        engine.forward(mine, part.prompts)
        branch = copy.deepcopy(mine)
        steps = _compared(engine, mine, part)
        for row, number in enumerate(part.numbers):
            found[number] = Divergence(*(values[[row]] for values in vars(steps).values()))
        for context in (ALL_TEXTS, len(reading.texts[part.numbers[0]])):
            uses[context] = uses.get(context, CacheUse()) + mine.use()
        first[part.numbers] = _until_different(engine, branch, part.answers)
        report(cache.name, len(found), len(reading.texts))
    forced = Divergence.join([found[number] for number in range(len(reading.texts))], axis=0)
    return scores_of(reading, forced, first, lambda context: uses[context])


def _compared(engine: HFModel, cache: DiffKVHFCache | DenseCache, part: _Part) -> Divergence:
    """Distances at every step of the texts, computed where the model is."""
    steps = [
        compare(part.log_probs[:, [step]], _log_probs(logits), part.tokens[:, [step + 1]])
        for step, logits in enumerate(_follow(engine, cache, part.tokens))
    ]
    return Divergence.join(steps, axis=1)


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _follow(engine: HFModel, cache: DiffKVHFCache | DenseCache, tokens: Tensor) -> Iterator[Tensor]:
    """Add given tokens but the last, one at a time: [batch, 1, vocabulary], the logits after each."""
    for step in range(tokens.shape[1] - 1):
        yield engine.forward(cache, tokens[:, [step]])


def _answer(engine: HFModel, cache: DenseCache, first: Tensor, steps: int) -> Tensor:
    """[batch, steps + 1]: greedy tokens, the first of which is given."""
    answers = [first]
    while len(answers) <= steps:
        answers.append(engine.forward(cache, answers[-1]).argmax(-1))
    return torch.cat(answers, 1)


def _until_different(
    engine: HFModel, cache: DiffKVHFCache | DenseCache, answers: Tensor
) -> np.ndarray:
    """[batch]: tokens of each answer, but for its first, before one that the cache would not choose."""
    steps = answers.shape[1] - 1
    first = torch.full((len(answers),), steps, device=answers.device)
    for step, logits in enumerate(_follow(engine, cache, answers)):
        differs = (logits[:, -1].argmax(-1) != answers[:, step + 1]) & (first == steps)
        first = torch.where(differs, step, first)
        if bool((first < steps).all()):
            break
    return first.cpu().numpy()
