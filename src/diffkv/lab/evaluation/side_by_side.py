"""The same questions, answered with several caches: what each spends, and how far it is from exact."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkv.lab.evaluation import english
from diffkv.lab.evaluation.divergence import compare, first_difference, mapped
from diffkv.quant import ConfigError
from diffkv.use import CacheUse
from diffkv.vllm_plugin.front.forcing import ForcedEngine, Script, forced_engine
from diffkv.vllm_plugin.options import Options

__all__ = ["QUESTIONS", "Answered", "Question", "Sides", "answer"]


@dataclass(frozen=True)
class Question:
    """About paragraphs of a State of the Union message, which precede it in the prompt.

    Attributes:
        message: by year and president.
        beginning: of the first paragraph.
        num_paragraphs: how many.
        question: what is asked.
    """

    message: str
    beginning: str
    num_paragraphs: int
    question: str

    @property
    def prompt(self) -> str:
        """Text and question."""
        text = english.passage(self.message, self.beginning, self.num_paragraphs)
        return f"{text}\n\nAnswer from the text above: {self.question}"


QUESTIONS = (
    Question(
        "1953-Truman-1",
        "Let me remind you",
        14,
        "How large was the public debt at its peak, and when?",
    ),
    Question(
        "1981-Carter-1",
        "Although it is essential that the Nation reduce",
        14,
        "What did the accident at Three Mile Island show?",
    ),
    Question("1981-Carter-1", "PROTECTION OF ALASKA", 24, "What does the Alaska Lands Act add?"),
)


@dataclass(frozen=True)
class Answered:
    """One cache's answers, beside those of full precision.

    Attributes:
        name: of the cache.
        use: what it held when the requests ended.
        same_tokens: for each question, tokens until the first that differs.
        kld_mean: KL(full || cache), mean over the tokens of all answers but their first, which
            comes from exact attention.
        same_top1: share of those tokens that would be this cache's first choice too.
        texts: its own answers; empty where they were not asked for.
    """

    name: str
    use: CacheUse
    same_tokens: list[int]
    kld_mean: float
    same_top1: float
    texts: list[str]


@dataclass(frozen=True)
class Sides:
    """The outcome.

    Attributes:
        prompt_tokens: of each question.
        num_tokens: of each answer in full precision.
        texts: answers in full precision.
        caches: the others.
        missing: caches that this device has not, and why.
    """

    prompt_tokens: list[int]
    num_tokens: list[int]
    texts: list[str]
    caches: list[Answered]
    missing: list[str]


Report = Callable[[str, int, int], None]
"""Is told of progress: name of the cache, answers done, answers in all; 0 of them when it starts."""

FULL = "full precision"


def answer(
    arguments: dict[str, Any],
    others: dict[str, tuple[dict[str, Any], Options | None]],
    questions: Sequence[Question],
    max_tokens: int,
    report: Report,
) -> Sides:
    """Answer in full precision, then follow those answers with other caches, one engine after the other.

    Args:
        arguments: of vLLM's engine, that all share.
        others: by name, further arguments and DiffKV's options; those with options answer for themselves
            too.
        questions: to answer.
        max_tokens: most tokens of an answer.
        report: progress.

    Raises:
        ConfigError: full precision or DiffKV cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="diffkv-sides-") as scratch:
        folder = Path(scratch)
        exact, texts = _answer_exactly(arguments, questions, max_tokens, folder, report)
        caches, missing = [], []
        for name, (more, options) in others.items():
            report(name, 0, len(questions))
            try:
                with forced_engine({**arguments, **more}, options) as engine:
                    caches.append(_follow(name, engine, exact, folder, options is not None, report))
            except ConfigError as error:
                if options is not None:
                    raise
                missing.append(f"{name}: {error}")
    return Sides([len(prompt) for prompt in exact.prompts], exact.lengths, texts, caches, missing)


@dataclass(frozen=True)
class _Exact:
    """Answers in full precision.

    Attributes:
        prompts: token ids.
        tokens: [questions, max_tokens] what followed.
        lengths: tokens of each answer, the one that ends it included.
        log_probs: [questions, max_tokens, vocabulary] float32, mapped from a file.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    lengths: list[int]
    log_probs: Tensor


def _answer_exactly(
    arguments: dict[str, Any],
    questions: Sequence[Question],
    max_tokens: int,
    folder: Path,
    report: Report,
) -> tuple[_Exact, list[str]]:
    """Answers in full precision, and their texts."""
    report(FULL, 0, len(questions))
    with forced_engine(arguments, None) as engine:
        prompts = [engine.encode_chat(question.prompt) for question in questions]
        file = folder / "full.npy"
        tokens, _ = engine.read(
            [Script(prompt, []) for prompt in prompts],
            max_tokens,
            file,
            lambda done: report(FULL, done, len(prompts)),
        )
        answers = [_until_end(engine, row) for row in tokens]
        texts = [engine.decode(row) for row in answers]
    exact = _Exact(prompts, tokens, [len(row) for row in answers], mapped(file))
    return exact, texts


def _follow(
    name: str, engine: ForcedEngine, exact: _Exact, folder: Path, answers_too: bool, report: Report
) -> Answered:
    """Read the exact answers with another cache, and let it answer for itself if asked to."""
    num, max_tokens = len(exact.prompts), len(exact.tokens[0])
    scripts = [Script(*pair) for pair in zip(exact.prompts, exact.tokens, strict=True)]
    if answers_too:
        scripts += [Script(prompt, []) for prompt in exact.prompts]
    file = folder / "cache.npy"
    tokens, use = engine.read(
        scripts, max_tokens, file, lambda done: report(name, done, len(scripts))
    )
    other = mapped(file)
    compared = compare(exact.log_probs, other[:num], torch.tensor(exact.tokens))
    # The first token follows the prompt directly, and comes from exact attention
    counted = np.arange(max_tokens)[None] < np.array(exact.lengths)[:, None]
    counted[:, 0] = False
    first = np.minimum(first_difference(compared.same), exact.lengths)
    return Answered(
        name=name,
        use=use,
        same_tokens=[int(step) for step in first],
        kld_mean=float(compared.kld[counted].mean()),
        same_top1=float(compared.same[counted].mean()),
        texts=[engine.decode(_until_end(engine, row)) for row in tokens[num:]],
    )


def _until_end(engine: ForcedEngine, tokens: list[int]) -> list[int]:
    """An answer up to the token that ends it, that one included."""
    return tokens[: tokens.index(engine.end) + 1] if engine.end in tokens else tokens
