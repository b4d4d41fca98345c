"""Measures settings with vLLM: requests bring their thresholds; a share of keys is the engine's."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from diffkv.calibrate.questions import AGREEMENT, Question, agreement
from diffkv.calibrate.search import Cost, Measure, Part, Setting
from diffkv.policies import with_distinct
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.session import Session, session

__all__ = ["Engine", "engines", "full_precision", "measure"]

Engine = Callable[[float], Session]
"""The engine whose policy keeps a share of distinct keys."""


@contextlib.contextmanager
def engines(arguments: dict[str, Any], options: Options) -> Iterator[Engine]:
    """One engine at a time, started when it is asked for; another share takes another engine.

    Args:
        arguments: of vLLM's engine, the model among them.
        options: DiffKV's.
    """
    running: dict[float, Session] = {}
    with contextlib.ExitStack() as stack:

        def engine(distinct: float) -> Session:
            if distinct not in running:
                stack.close()
                running.clear()
                ours = replace(options, policy=with_distinct(options.policy, distinct))
                running[distinct] = stack.enter_context(session(arguments, ours))
            return running[distinct]

        yield engine


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
    engine: Engine, questions: Sequence[Question], metric: str, full: Sequence[Any]
) -> Measure:
    """A measure that asks an engine.

    Args:
        engine: with DiffKV, for each share.
        questions: what is asked.
        metric: how it is scored.
        full: as `full_precision` found it.
    """

    def ask(setting: Setting, samples: range) -> Part:
        asked = questions[samples.start : samples.stop]
        prompts = [question.prompt for question in asked]
        answers, use = engine(setting.distinct).answer(
            prompts, _sampling(asked, metric), setting.thresholds
        )
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
