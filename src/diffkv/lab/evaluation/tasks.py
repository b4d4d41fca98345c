"""The tasks: a context, a question about it, and the only right answer.

A task is a function of a seeded generator, a language and a length; the language writes it down, so
that one task serves the shipped models, which know their own words only, and any other one. To add a
task: write the function, and name it in `TASKS` and in the languages that have words for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffkv.quant import ConfigError

__all__ = [
    "FILLER_TOKENS",
    "SETTINGS",
    "TASKS",
    "Answer",
    "Parts",
    "Sample",
    "Setting",
    "chain",
    "compose",
    "draw",
    "pick",
    "pick_any",
    "retrieval",
    "running_sum",
    "scatter",
]

Answer = tuple[tuple[str, bool], ...]
"""Words of a right answer, and whether each counts: what the question itself says does not."""

Setting = Literal["easy", "hard"]
SETTINGS: tuple[Setting, ...] = ("easy", "hard")

FILLER_TOKENS = 160
"""Between the last fact and the question, in the setting hard: more than twice the window."""

LISTED, WALKED, ADDED, PASSKEYS, FREQUENT = 16, 24, 12, 2, 3
LONG_WALK = 240
MOST_PAIRS = 256


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: is compressed as a whole: it ends with the question (easy), or with filler (hard).
        question: comes afterwards, token by token; empty where the prompt has it.
        answer: the only right one.
        choices: words one of which is the answer, the likeliest being taken; none: any text may be.
    """

    prompt: str
    question: str
    answer: Answer
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """What a task makes: facts in their order, and the question with its answer.

    Attributes:
        facts: the context's.
        question: about them.
        answer: to it.
        places: where the facts are in the filler, 0 .. 1; None: anywhere between it.
        choices: see `Sample`.
    """

    facts: list[str]
    question: str
    answer: Answer
    places: Sequence[float] | None = None
    choices: tuple[str, ...] = ()


Task = Callable[[np.random.Generator, Any, int, int], Parts]
"""(generator, language, tokens of the context, number of the sample) -> its parts."""


def pick(rng: np.random.Generator, pool: Sequence[Any], num: int) -> list[Any]:
    """Different members of a pool."""
    return [pool[i] for i in rng.permutation(len(pool))[:num]]


def pick_any(rng: np.random.Generator, pool: Sequence[Any], num: int) -> list[Any]:
    """Members of a pool, repeats allowed."""
    return [pool[i] for i in rng.integers(0, len(pool), num)]


def _num_facts(language: Any, fact: str, num_tokens: int, asked: int) -> int:
    """Facts that fill three quarters of a context."""
    return max(asked, min(len(language.keys), num_tokens * 3 // 4 // language.count(fact)))


def retrieval(
    rng: np.random.Generator,
    language: Any,
    num_tokens: int,
    number: int,
    num_facts: int | None = None,
    num_asked: int = LISTED,
) -> Parts:
    """Many keys with values; the values of some are asked for."""
    example = language.fact(language.keys[0], language.values[0])
    num_facts = num_facts or _num_facts(language, example, num_tokens, num_asked)
    keys, values = pick(rng, language.keys, num_facts), pick_any(rng, language.values, num_facts)
    asked = rng.permutation(num_facts)[:num_asked]
    question, answer = language.ask_values([keys[i] for i in asked], [values[i] for i in asked])
    facts = [language.fact(key, value) for key, value in zip(keys, values, strict=True)]
    return Parts(facts, question, answer)


def passkey(rng: np.random.Generator, language: Any, num_tokens: int, number: int) -> Parts:
    """Two keys in filler; the depth goes from the start to the end of the context over the samples."""
    keys, values = pick(rng, language.keys, PASSKEYS), pick_any(rng, language.values, PASSKEYS)
    question, answer = language.ask_values(keys, values)
    facts = [language.fact(key, value) for key, value in zip(keys, values, strict=True)]
    depth = (number % 8 + 0.5) / 8
    return Parts(facts, question, answer, [depth] * PASSKEYS)


def chain(
    rng: np.random.Generator,
    language: Any,
    num_tokens: int,
    number: int,
    num_keys: int | None = None,
    num_asked: int = WALKED,
) -> Parts:
    """Links of one cycle, shuffled; a walk along them, each step read from the one before."""
    link = language.link(*language.keys[:2])
    num_keys = num_keys or _num_facts(language, link, num_tokens, num_asked + 1)
    keys = pick(rng, language.keys, num_keys)
    links = [language.link(keys[i - 1], keys[i]) for i in rng.permutation(num_keys)]
    question, answer = language.ask_chain(keys[-1], keys[:num_asked])
    return Parts(links, question, answer)


def long_chain(rng: np.random.Generator, language: Any, num_tokens: int, number: int) -> Parts:
    """The same with links that fill the context, and a walk along nearly all of them."""
    link = language.link(*language.keys[:2])
    num_keys = min(len(language.keys), num_tokens // language.count(link))
    return chain(rng, language, num_tokens, number, num_keys, min(LONG_WALK, num_keys - 1))


def pair_chain(rng: np.random.Generator, language: Any, num_tokens: int, number: int) -> Parts:
    """Links between keys of two words out of a small grid: each differs in one word from many others."""
    first, second = language.keys[:2]
    link = language.link(f"{first} {second}", f"{second} {first}")
    num_nodes = min(MOST_PAIRS, num_tokens // language.count(link))
    side = int(np.ceil(np.sqrt(num_nodes * 1.5)))
    rows, columns = pick(rng, language.keys, side), pick(rng, language.keys, side)
    cells = rng.permutation(side * side)[:num_nodes]
    nodes = [(rows[cell // side], columns[cell % side]) for cell in cells]
    texts = [" ".join(node) for node in nodes]
    links = [language.link(texts[i - 1], texts[i]) for i in rng.permutation(num_nodes)]
    walked = nodes[: min(LONG_WALK // 4, num_nodes - 1)]
    question, answer = language.ask_chain(texts[-1], [word for node in walked for word in node])
    return Parts(links, question, answer)


def hot(rng: np.random.Generator, language: Any, num_tokens: int, number: int) -> Parts:
    """Facts, then questions about some of them again and again: past attention says what is needed."""
    num_facts = min(len(language.keys), num_tokens // 6)
    keys, values = pick(rng, language.keys, num_facts), pick_any(rng, language.values, num_facts)
    shares = 1 / np.arange(1, num_facts + 1)
    shares /= shares.sum()
    parts = [language.fact(key, value) for key, value in zip(keys, values, strict=True)]
    order = rng.permutation(
        num_facts
    )  # so that place and popularity have nothing to do with each other
    room = num_tokens - sum(map(language.count, parts))
    while (asked := language.asked(keys[0], values[0])) and room >= language.count(asked):
        i = order[rng.choice(num_facts, p=shares)]
        parts.append(language.asked(keys[i], values[i]))
        room -= language.count(asked)
    last = order[rng.choice(num_facts, LISTED, replace=False, p=shares)]
    question, answer = language.ask_values([keys[i] for i in last], [values[i] for i in last])
    return Parts(parts, question, answer, [i / len(parts) for i in range(len(parts))])


def copy(rng: np.random.Generator, language: Any, num_tokens: int, number: int) -> Parts:
    """A list of words, to be repeated."""
    facts, question, answer = language.ask_copy(pick(rng, language.keys, language.num_copied))
    return Parts(facts, question, answer, [0.5] * len(facts))


def running_sum(
    rng: np.random.Generator,
    language: Any,
    num_tokens: int,
    number: int,
    num_facts: int | None = None,
    num_asked: int = ADDED,
) -> Parts:
    """Keys with numbers; some are added up, step by step."""
    example = language.number_fact(language.keys[0], 1)
    num_facts = num_facts or _num_facts(language, example, num_tokens, num_asked)
    keys, numbers = pick(rng, language.keys, num_facts), pick_any(rng, language.numbers, num_facts)
    asked = rng.permutation(num_facts)[:num_asked]
    question, answer = language.ask_sum([keys[i] for i in asked], [numbers[i] for i in asked])
    facts = [language.number_fact(key, n) for key, n in zip(keys, numbers, strict=True)]
    return Parts(facts, question, answer)


def frequent_words(rng: np.random.Generator, language: Any, num_tokens: int, number: int) -> Parts:
    """Things named once, and three that are named many times."""
    num_lines = max(30, num_tokens * 3 // 4 // 8)
    keys = pick(rng, language.keys, min(len(language.keys), FREQUENT + num_lines // 2))
    often = [key for key in keys[:FREQUENT] for _ in range(num_lines // 2 // FREQUENT)]
    named = [*often, *keys[FREQUENT:]]
    lines = [f"Then came the {named[i]}." for i in rng.permutation(len(named))]
    question, answer = language.ask_frequent(keys[:FREQUENT])
    return Parts(lines, question, answer)


def lookup(rng: np.random.Generator, language: Any, num_tokens: int, number: int) -> Parts:
    """A few facts in filler; the value of one of them is asked for."""
    keys = pick(rng, language.keys, language.num_facts)
    values = pick(rng, language.values, language.num_facts)
    question, answer = language.ask_value(keys[0], values[0])
    facts = [language.fact(key, value) for key, value in zip(keys, values, strict=True)]
    return Parts(pick(rng, facts, len(facts)), question, answer)


def cloze(rng: np.random.Generator, language: Any, num_tokens: int, number: int) -> Parts:
    """People and where they are, in filler; the place of one of them is chosen among all of theirs."""
    people = pick(rng, language.people, language.num_choices)
    places = pick(rng, language.places, language.num_choices)
    question, answer = language.ask_place(people[0], places[0])
    facts = [language.place_fact(*pair) for pair in zip(people, places, strict=True)]
    choices = tuple(pick(rng, places, len(places)))
    return Parts(pick(rng, facts, len(facts)), question, answer, choices=choices)


def quote(rng: np.random.Generator, language: Any, num_tokens: int, number: int) -> Parts:
    """A sentence in filler, begun again; it goes on as it did."""
    facts, question, answer = language.ask_quote(rng)
    return Parts(facts, question, answer)


TASKS: dict[str, Task] = {
    "retrieval": retrieval,
    "passkey": passkey,
    "chain": chain,
    "copy": copy,
    "sum": running_sum,
    "frequent-words": frequent_words,
    "long-chain": long_chain,
    "pair-chain": pair_chain,
    "hot": hot,
    "lookup": lookup,
    "cloze": cloze,
    "quote": quote,
}
"""Every task by name."""


def scatter(
    rng: np.random.Generator, language: Any, facts: Sequence[str], num_tokens: int
) -> list[str]:
    """Facts in their order, and filler at random places between them, to about `num_tokens` tokens.

    Exactly so many in the shipped language; facts that alone are longer come back without filler.
    """
    filler = _filler(rng, language, num_tokens - sum(map(language.count, facts)))
    is_fact = rng.permutation(len(facts) + len(filler)) < len(facts)
    rest = {True: iter(facts), False: iter(filler)}
    return [next(rest[bool(here)]) for here in is_fact]


def _placed(rng: np.random.Generator, language: Any, parts: Parts, num_tokens: int) -> list[str]:
    """The same with the facts at their places in the filler."""
    assert parts.places is not None, "facts without places are scattered"
    segments = _filler(rng, language, num_tokens - sum(map(language.count, parts.facts)))
    num_sentences = len(segments)
    for place, fact in zip(reversed(parts.places), reversed(parts.facts), strict=True):
        segments.insert(round(place * num_sentences), fact)
    return segments


def _filler(rng: np.random.Generator, language: Any, num_tokens: int) -> list[str]:
    """Sentences of `num_tokens` tokens; the last one loses its first words where it is too long."""
    sentences: list[str] = []
    while num_tokens > 0:
        words = language.sentence(rng).split()
        while len(words) > 1 and language.count(" ".join(words)) > num_tokens:
            words = words[1:]
        sentences.append(" ".join(words))
        num_tokens -= language.count(sentences[-1])
    return sentences


def compose(
    rng: np.random.Generator, language: Any, setting: Setting, num_tokens: int, parts: Parts
) -> Sample:
    """Write a sample of `num_tokens` tokens of context and question, or of context and filler.

    What follows a prompt directly comes from exact attention: a choice follows the last word of the
    question, so in the setting easy that word alone comes after the prompt.
    """
    room = num_tokens - language.count(language.opening)
    question, end = parts.question, ""
    if setting == "easy":
        room -= language.count(question)
        end, question = question, ""
        if parts.choices:
            end, _, last = end.rpartition(" ")
            question = f" {last}"
    else:
        room -= FILLER_TOKENS
        end = language.separator.join(_filler(rng, language, FILLER_TOKENS))
        question = language.separator + question
    if parts.places is None:
        context = scatter(rng, language, parts.facts, room)
    else:
        context = _placed(rng, language, parts, room)
    prompt = language.opening + language.separator.join(context) + language.separator + end
    return Sample(prompt, question, parts.answer, parts.choices)


def draw(
    task: str, language: Any, setting: Setting, num_tokens: int, num_samples: int, seed: int
) -> list[Sample]:
    """Draw samples; the same arguments give the same samples.

    Args:
        task: name in `TASKS`.
        language: member of `diffkv.lab.evaluation.languages.LANGUAGES`.
        setting: easy or hard.
        num_tokens: length of context and question together, or of context and filler.
        num_samples: how many.
        seed: draws all choices.

    Raises:
        ConfigError: an unknown task, or one that the language has no words for.
    """
    if task not in language.tasks:
        raise ConfigError(
            f"unknown task {task!r} for the language {language.name}: there are "
            f"{', '.join(language.tasks)}"
        )
    room = num_tokens - language.count(language.opening) - FILLER_TOKENS
    samples = []
    for number in range(num_samples):
        rng = np.random.default_rng([seed, list(TASKS).index(task), number])
        parts = TASKS[task](rng, language, room, number)
        samples.append(compose(rng, language, setting, num_tokens, parts))
    return samples
