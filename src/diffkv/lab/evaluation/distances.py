"""The suite `kld`, whatever the engine: what is read, what is compared, and a row for each cache.

Every cache reads the same tokens after the same prompts, and each next-token distribution is compared
with that of full precision. What follows a prompt directly is left out, for it comes from exact
attention. Then each cache follows the answer that full precision gives to the same prompt: the first
token that it would not have chosen is where free running would part.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from diffkv.lab.evaluation.divergence import Divergence
from diffkv.lab.evaluation.results import ALL_TEXTS, DISTANCES, DistanceScore, figures
from diffkv.lab.rows import Row, Writer
from diffkv.quant import ConfigError
from diffkv.use import CacheUse

__all__ = ["Reading", "Report", "compare_caches", "read_texts", "scores_of"]

DIGEST_LENGTH = 12

C = TypeVar("C")

Report = Callable[[str, int, int], None]
"""Is told of progress: name of the cache, texts done, texts in all."""


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


def read_texts(content: str) -> list[str]:
    """One text a line, or JSON lines with "text", or with "prompt" and "answer".

    Raises:
        ConfigError: a line that is neither, or no line at all.
    """
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        if not line.startswith("{"):
            texts.append(line)
            continue
        try:
            row = json.loads(line)
            texts.append(str(row["text"]) if "text" in row else f"{row['prompt']} {row['answer']}")
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f'line {number} is no JSON object with "text", or with "prompt" and "answer"'
            ) from None
    if not texts:
        raise ConfigError("there is no text: give one a line, or JSON lines")
    return texts


def compare_caches(
    asked: Sequence[tuple[C, dict[str, Any]]],
    writer: Writer,
    measure: Callable[[C], list[DistanceScore]],
) -> Iterator[Row]:
    """A row for each cache; one that cannot be run gets a row with the error.

    Args:
        asked: caches, and the cases of their rows.
        writer: of the rows; those that it has already are not measured again.
        measure: reads with a cache.
    """
    for cache, case in asked:
        row = writer.find(DISTANCES, case)
        if row is None:
            start = time.perf_counter()
            try:
                found = measure(cache)
            except ConfigError as error:
                row = writer.add(DISTANCES, case, {}, error=str(error))
            else:
                seconds = round(time.perf_counter() - start, 1)
                row = writer.add(DISTANCES, case, {**figures(DISTANCES, found), "seconds": seconds})
        yield row


def scores_of(
    reading: Reading,
    forced: Divergence,
    first: np.ndarray,
    use_of: Callable[[int | str], CacheUse],
) -> list[DistanceScore]:
    """A score for each cell.

    Args:
        reading: what was read.
        forced: [texts, steps] of the texts' own tokens.
        first: [texts] tokens of each answer before the first that the cache would not have chosen.
        use_of: what the requests of a cell held.
    """
    lengths = np.array([len(text) for text in reading.texts])
    found = []
    for context in reading.contexts:
        chosen = lengths > 0 if context == ALL_TEXTS else lengths == context
        kld = forced.kld[chosen]
        found.append(
            DistanceScore(
                context=context,
                n=len(kld),
                steps=kld.size,
                kld_mean=float(kld.mean()),
                kld_median=float(np.median(kld)),
                kld_p99=float(np.quantile(kld, 0.99)),
                kld_p999=float(np.quantile(kld, 0.999)),
                same_top1=float(forced.same[chosen].mean()),
                perplexity=math.exp(forced.nll[chosen].mean()),
                perplexity_full=math.exp(forced.nll_full[chosen].mean()),
                first_divergence=float(first[chosen].mean()),
                diverged=float((first[chosen] < reading.steps).mean()),
                **use_of(context).per_token(),
            )
        )
    return found
