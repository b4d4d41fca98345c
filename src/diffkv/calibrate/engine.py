"""Measures thresholds with vLLM: one engine, whose requests bring their own."""

from collections.abc import Sequence
from typing import Any

from diffkv.calibrate.questions import AGREEMENT, Question, agreement
from diffkv.calibrate.search import Cost, Measure, Part
from diffkv.policy import Thresholds
from diffkv.vllm_plugin.session import Session, session

__all__ = ["full_precision", "measure"]


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
