"""Evaluations of one model: every cache with every plan, a row for each pair."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence

from diffkv.lab.evaluation import synth
from diffkv.lab.evaluation.engine import Compared, Engine
from diffkv.lab.evaluation.languages import LANGUAGES, English, Language, ReferenceWords
from diffkv.lab.evaluation.results import TASKS, TaskScore, figures
from diffkv.lab.rows import Row, Writer
from diffkv.quant import ConfigError

__all__ = ["language_of", "run_tasks"]


def language_of(vocabulary: Collection[str], name: str | None) -> Language:
    """The language for a model: the one asked for, else the one whose words it has.

    Args:
        vocabulary: texts of its tokens.
        name: the language asked for; None: whichever fits.

    Raises:
        ConfigError: there is no such language, or the model has not its words.
    """
    words = ReferenceWords()
    knows = all(word in vocabulary for word in (*words.keys, *words.values))
    if name is None:
        return words if knows else English()
    if name not in LANGUAGES:
        raise ConfigError(f"unknown language {name!r}: there are {', '.join(LANGUAGES)}")
    if isinstance(LANGUAGES[name], ReferenceWords) and not knows:
        raise ConfigError(
            f"this model does not know the words of the language {name}: leave it out"
        )
    return LANGUAGES[name]


def run_tasks(
    engine: Engine,
    model: str,
    caches: Sequence[Compared],
    plans: Sequence[synth.Plan],
    writer: Writer,
    report: Callable[[TaskScore], None] = lambda score: None,
) -> Iterator[Row]:
    """Run the suite `synth`; what the full cache answers is computed once for each plan.

    Args:
        engine: answers.
        model: its name.
        caches: to compare with the full one.
        plans: what is asked.
        writer: takes the rows; those that it has already are not measured again.
        report: is told of each task.

    Raises:
        ConfigError: a cache or a setting that the engine does not have.
    """
    asked = [
        (
            cache,
            plan,
            {**cache.method(model, engine.name).case(), "dtype": engine.dtype, **plan.case()},
        )
        for cache in caches
        for plan in plans
    ]
    for cache, plan, _ in asked:
        engine.check(cache, plan.settings)
    missing = [plan for _, plan, case in asked if writer.find(TASKS, case) is None]
    full = {
        plan: synth.full_scores(plan, lambda samples, num: engine.answer(samples, num, None))
        for plan in dict.fromkeys(missing)
    }
    for cache, plan, case in asked:
        row = writer.find(TASKS, case)
        if row is None:
            start = time.perf_counter()
            found = synth.task_scores(
                plan,
                lambda samples, num, cache=cache: engine.answer(samples, num, cache),
                full[plan],
                report,
            )
            seconds = round(time.perf_counter() - start, 1)
            row = writer.add(TASKS, case, {**figures(TASKS, found), "seconds": seconds})
        yield row
