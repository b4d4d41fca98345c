"""Measures thresholds with vLLM: engines whose requests bring their own."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from diffkv.calibrate.questions import AGREEMENT, Question, agreement
from diffkv.calibrate.search import Cost, Measure, Part
from diffkv.policy import Thresholds
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.session import Session, session

__all__ = ["full_precision", "measure", "measuring"]


def _sampling(questions: Sequence[Question], metric: str) -> list[dict[str, Any]]:
    """Greedy; an answer that is compared token by token has its full length."""
    return [
        {
            "temperature": 0.0,
            "max_tokens": question.max_tokens,
            "ignore_eos": metric == AGREEMENT,
        }
        for question in questions
    ]


def full_precision(
    arguments: dict[str, Any], questions: Sequence[Question], metric: str
) -> list[Any]:
    """Answers through vLLM's own cache, by an engine of their own.

    Args:
        arguments: of vLLM's engine, the model among them.
        questions: what is asked.
        metric: how it is scored.

    Returns:
        For each question its score, or its token ids if answers are compared by tokens.
    """
    with session(arguments, None) as engine:
        prompts = [question.prompt for question in questions]
        answers, _ = engine.answer(prompts, _sampling(questions, metric))
    if metric == AGREEMENT:
        return [answer.token_ids for answer in answers]
    return [
        question.score(answer.text) for answer, question in zip(answers, questions, strict=True)
    ]


def measure(
    engine: Session, questions: Sequence[Question], metric: str, full: Sequence[Any]
) -> Measure:
    """A measure that asks an engine.

    Args:
        engine: with DiffKV.
        questions: what is asked.
        metric: how it is scored.
        full: as `full_precision` found it.
    """

    def ask(thresholds: Thresholds, samples: range) -> Part:
        asked = questions[samples.start : samples.stop]
        prompts = [question.prompt for question in asked]
        answers, use = engine.answer(prompts, _sampling(asked, metric), thresholds)
        assert use is not None
        losses = []
        for answer, question, best in zip(
            answers, asked, full[samples.start : samples.stop], strict=True
        ):
            if metric == AGREEMENT:
                losses.append(1.0 - agreement(answer.token_ids, best))
            else:
                losses.append(best - question.score(answer.text))
        num_bytes, bf16_bytes = (
            each * use.tokens for each in (use.bytes_per_token, use.bf16_bytes_per_token)
        )
        return Part(tuple(losses), Cost(use.tokens, use.high, use.low, num_bytes, bf16_bytes))

    return ask


@contextlib.contextmanager
def measuring(
    arguments: dict[str, Any],
    options: Options,
    questions: Sequence[Question],
    metric: str,
    full: Sequence[Any],
) -> Iterator[Measure]:
    """A measure that starts engines as it needs them, one at a time.

    While alpha_low is 0 the engine keeps no sums of low tokens, as one that serves with such a choice:
    its bytes are those of the choice.

    Args:
        arguments: of vLLM's engine, the model among them.
        options: DiffKV's, but for thresholds and drops.
        questions: what is asked.
        metric: how it is scored.
        full: as `full_precision` found it.
    """
    with contextlib.ExitStack() as running:
        measures: dict[bool, Measure] = {}

        def ask(thresholds: Thresholds, samples: range) -> Part:
            drops = thresholds.alpha_low > 0
            if drops not in measures:
                measures.clear()
                running.close()
                engine = running.enter_context(session(arguments, replace(options, drops=drops)))
                measures[drops] = measure(engine, questions, metric, full)
            return measures[drops](thresholds, samples)

        yield ask
