"""Statements that are completed, not asked: for small models, which lose track of questions."""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from diffkv.lab.evaluation import english
from diffkv.lab.evaluation.tasks import Answer

__all__ = ["Statements"]


def _sentences() -> tuple[str, ...]:
    return _plain(tuple(english.messages().values()))


@cache
def _plain(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Plain sentences of texts, none of which has a number or a quotation."""
    found: dict[str, None] = {}
    for paragraph in "\n".join(texts).splitlines():
        # Two small letters before it, or a stop may be that of an abbreviation
        for sentence in re.split(r"(?<=[a-z][a-z]\.) +(?=[A-Z])", paragraph):
            if re.fullmatch(r"[A-Z][A-Za-z ,'()-]{40,160}\.", sentence):
                found[sentence] = None
    return tuple(found)


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+", text)


class Statements:
    """Facts, lists and sentences of which the beginning is said again.

    An answer's words are compared one by one, at their places. Lengths are estimated.
    """

    name = "statements"
    max_answer_tokens = 32
    opening = ""
    tasks = ("lookup", "cloze", "copy", "quote")
    separator = "\n"
    num_facts = 1
    num_choices = 3
    num_copied = 6
    begun, continued = 8, 4
    keys = tuple(
        "anchor basket candle dragon engine falcon garden hammer island jacket kettle lantern marble "
        "needle otter pepper rocket saddle bridge castle forest harbor museum tower river school".split()
    )
    values = tuple(str(i) for i in range(1000, 10000))
    people = tuple(
        "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Kate Leo Mary Nancy Oscar Paul".split()
    )
    places = tuple(
        "Paris London Berlin Rome Madrid Vienna Prague Athens Dublin Boston Chicago Houston".split()
    )
    _tokens_per_word = 1.35

    def sentence(self, rng: np.random.Generator) -> str:
        """A sentence of a State of the Union message."""
        return str(rng.choice(_sentences()))

    def fact(self, key: str, value: str) -> str:
        """A key has a value."""
        return f"The secret number of the {key} is {value}."

    def ask_value(self, key: str, value: str) -> tuple[str, Answer]:
        """Begin to say the value of a key."""
        return f"The secret number of the {key} is", ((value, True),)

    def place_fact(self, person: str, place: str) -> str:
        """A person is somewhere."""
        return f"The home town of {person} is {place}."

    def ask_place(self, person: str, place: str) -> tuple[str, Answer]:
        """Begin to say where a person is."""
        return f"The home town of {person} is", ((place, True),)

    def ask_copy(self, words: Sequence[str]) -> tuple[list[str], str, Answer]:
        """A list, and its beginning once more."""
        first, *others = words
        fact = f"The list is: {', '.join(words)}."
        return [fact], f"The list is: {first},", tuple((word, True) for word in others)

    def ask_quote(self, rng: np.random.Generator) -> tuple[list[str], str, Answer]:
        """A sentence, and its beginning once more."""
        least = self.begun + self.continued
        long = [text for text in _sentences() if len(text.split()) > least]
        words = str(rng.choice(long)).split()
        following = _words(" ".join(words[self.begun :]))[: self.continued]
        answer = tuple((word, True) for word in following)
        return [" ".join(words)], " ".join(words[: self.begun]), answer

    def count(self, text: str) -> int:
        """Tokens of a text, estimated."""
        return round(len(text.split()) * self._tokens_per_word)

    def score(self, text: str, answer: Answer) -> float:
        """Share of the words that stand at their places."""
        given = _words(text)
        right = [i < len(given) and given[i] == word for i, (word, _) in enumerate(answer)]
        return sum(right) / len(right)
