"""Measures settings with vLLM: requests bring their thresholds; a share of keys is the engine's."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from diffkv.lab.calibrate.questions import AGREEMENT, Question, agreement
from diffkv.lab.calibrate.search import Measure, Part, Setting
from diffkv.policies import with_distinct
from diffkv.vllm_plugin.front.session import Session, session
from diffkv.vllm_plugin.options import Options

__all__ = ["Engine", "engines", "full_precision", "measure"]

Engine = Callable[[Setting], Session]
"""The engine that measures a setting."""


@contextlib.contextmanager
def engines(arguments: dict[str, Any], options: Options) -> Iterator[Engine]:
    """One engine at a time, started when a setting asks for it.

    Another share of distinct keys takes another engine, and so does the first alpha_low above 0: while
    it is 0 the engine keeps no sums of low tokens, as one that serves with such a choice, and its bytes
    are those of the choice.

    Args:
        arguments: arguments of vLLM's engine, the model among them.
        options: DiffKV's, but for thresholds and drops.
    """
    running: dict[tuple[float, bool], Session] = {}
    with contextlib.ExitStack() as stack:

        def engine(setting: Setting) -> Session:
            drops = setting.thresholds.drops
            kind = setting.distinct, drops
            if kind not in running:
                stack.close()
                running.clear()
                policy = with_distinct(options.policy, setting.distinct)
                ours = replace(options, policy=policy, drops=drops)
                running[kind] = stack.enter_context(session(arguments, ours))
            return running[kind]

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
        arguments: arguments of vLLM's engine, the model among them.
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
        engine: with DiffKV, for each setting.
        questions: what is asked.
        metric: how it is scored.
        full: as `full_precision` found it.
    """

    def ask(setting: Setting, samples: range) -> Part:
        asked = questions[samples.start : samples.stop]
        prompts = [question.prompt for question in asked]
        answers, use = engine(setting).answer(prompts, _sampling(asked, metric), setting.thresholds)
        assert use is not None
        losses = []
        for answer, question, best in zip(
            answers, asked, full[samples.start : samples.stop], strict=True
        ):
            if metric == AGREEMENT:
                losses.append(1.0 - agreement(answer.token_ids, best))
            else:
                losses.append(best - question.score(answer.text))
        return Part(tuple(losses), use)

    return ask
