"""How facts and questions are written: in the shipped models' own words, or in English.

The words of the shipped models are those of their tokenizer (src/diffkv/data/reference/README.md).
"""

import re
from collections.abc import Sequence
from itertools import product

import numpy as np

from diffkv.lab.evaluation.statements import Statements
from diffkv.lab.evaluation.tasks import Answer

__all__ = ["LANGUAGES", "English", "HardWords", "Language", "ReferenceWords", "plain"]


def plain(text: str) -> str:
    """Words and numbers of a text in small letters, a space between them: "3.5" is one, "$" is none."""
    return " ".join(re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+", text.lower()))


class ReferenceWords:
    """The language of the shipped models: one word is one token.

    Its answers are compared word by word, at their places.
    """

    name = "reference"
    max_answer_tokens = None
    opening = "<bos> "
    tasks = ("retrieval", "passkey", "chain", "copy", "sum")
    keys = tuple(f"k{i}" for i in range(256))
    values = tuple(f"v{i}" for i in range(128))
    numbers = tuple(range(16))
    modulus = 16
    num_copied = 80
    separator = " "
    words = tuple(f"w{i}" for i in range(96))
    _word_shares = 1 / np.arange(1, 97) / (1 / np.arange(1, 97)).sum()

    def sentence(self, rng: np.random.Generator) -> str:
        """Filler of 2 to 8 words, frequent ones first, closed by a stop."""
        words = rng.choice(self.words, rng.integers(2, 9), p=self._word_shares)
        return " ".join([*words, "."])

    def fact(self, key: str, value: str) -> str:
        """A key has a value."""
        return f"{key} {value} ;"

    def link(self, key: str, following: str) -> str:
        """A key is followed by another."""
        return f"{key} {following} ;"

    def number_fact(self, key: str, number: int) -> str:
        """A key has a number."""
        return f"{key} n{number} ;"

    def ask_values(self, keys: Sequence[str], values: Sequence[str]) -> tuple[str, Answer]:
        """Ask for the values of keys."""
        pairs = list(zip(keys, values, strict=True))
        words = [(word, scored) for k, v in pairs for word, scored in ((k, False), (v, True))]
        return f"? ? {' '.join(keys)} ;", tuple(words)

    def ask_chain(self, start: str, keys: Sequence[str]) -> tuple[str, Answer]:
        """Ask for the keys that follow `start`."""
        return f"@ {start}", tuple((key, True) for key in keys)

    def ask_copy(self, words: Sequence[str]) -> tuple[list[str], str, Answer]:
        """No facts: the question itself holds the words to copy."""
        text = f"copy {' '.join(words)} again"
        return [], text, tuple((word, True) for word in words)

    def ask_sum(self, keys: Sequence[str], numbers: Sequence[int]) -> tuple[str, Answer]:
        """Ask for the sum of the numbers of keys, step by step, modulo 16."""
        words, total = [("n0", False)], 0
        for key, number in zip(keys, numbers, strict=True):
            total = (total + number) % self.modulus
            words += [(key, False), (f"n{number}", True), (f"n{total}", True)]
        return f"sum sum {' '.join(keys)} ;", tuple(words)

    def asked(self, key: str, value: str) -> str:
        """A question that the context itself answers."""
        return f"? {key} {value} ;"

    def count(self, text: str) -> int:
        """Tokens of a text; exact."""
        return len(text.split())

    def score(self, text: str, answer: Answer) -> float:
        """Share of the scored words that stand at their places."""
        given = text.split()
        scored = [(i, word) for i, (word, counts) in enumerate(answer) if counts]
        return sum(i < len(given) and given[i] == word for i, word in scored) / len(scored)


class HardWords(ReferenceWords):
    """The same words in harder tasks, which `reference-128` was trained on."""

    name = "reference-128"
    tasks = ("retrieval", "passkey", "hot", "long-chain", "pair-chain")


class English:
    """Plain English, for models that know it; completions, no chat template.

    Scored words are looked for anywhere in the answer, as RULER does. Lengths are estimated.
    """

    name = "english"
    max_answer_tokens = 96
    opening = ""
    tasks = ("retrieval", "passkey", "chain", "copy", "sum", "frequent-words")
    separator = "\n"
    numbers = tuple(range(2, 10))
    num_copied = 12
    values = tuple(str(i) for i in range(1000, 10000))
    _tokens_per_word = 1.5
    _first = (
        "amber",
        "bitter",
        "copper",
        "dusty",
        "early",
        "frozen",
        "gentle",
        "hidden",
        "ivory",
        "jolly",
        "kind",
        "loud",
        "misty",
        "noble",
        "orange",
        "proud",
        "quiet",
        "rapid",
        "silver",
        "tidy",
    )
    _second = (
        "anchor",
        "basket",
        "candle",
        "dragon",
        "engine",
        "falcon",
        "garden",
        "hammer",
        "island",
        "jacket",
        "kettle",
        "lantern",
        "marble",
        "needle",
        "otter",
        "pepper",
        "rocket",
        "saddle",
    )
    keys = tuple(" ".join(pair) for pair in product(_first, _second))
    _filler = (
        "The road was long and the weather stayed calm.",
        "People walked along the river and talked about the harvest.",
        "Nothing of note happened in the market that day.",
        "A few clouds moved slowly over the hills.",
        "The old clock in the hall was a little late, as always.",
        "Someone had left the window open during the night.",
    )

    def sentence(self, rng: np.random.Generator) -> str:
        """A line without any fact."""
        return str(rng.choice(self._filler))

    def fact(self, key: str, value: str) -> str:
        """A key has a value."""
        return f"The code of the {key} is {value}."

    def link(self, key: str, following: str) -> str:
        """A key is followed by another."""
        return f"After the {key} comes the {following}."

    def number_fact(self, key: str, number: int) -> str:
        """A key has a number."""
        return f"The {key} costs {number} coins."

    def ask_values(self, keys: Sequence[str], values: Sequence[str]) -> tuple[str, Answer]:
        """Ask for the values of keys."""
        asked = ", ".join(f"the {key}" for key in keys)
        text = f"Question: What are the codes of {asked}, in this order?\nAnswer: The codes are"
        return text, tuple((value, True) for value in values)

    def ask_chain(self, start: str, keys: Sequence[str]) -> tuple[str, Answer]:
        """Ask for the keys that follow `start`."""
        text = (
            f"Question: Start at the {start} and follow the chain for {len(keys)} steps. What comes, "
            f"in this order?\nAnswer: After the {start} come the"
        )
        return text, tuple((key, True) for key in keys)

    def ask_copy(self, words: Sequence[str]) -> tuple[list[str], str, Answer]:
        """Facts, the question, and the words that it asks to be copied from them."""
        text = "Question: Repeat the list exactly.\nAnswer: The list is:"
        return [f"The list is: {', '.join(words)}."], text, tuple((word, True) for word in words)

    def ask_sum(self, keys: Sequence[str], numbers: Sequence[int]) -> tuple[str, Answer]:
        """Ask for the cost of several things; only the total is scored."""
        asked = ", ".join(f"the {key}" for key in keys)
        text = f"Question: How many coins do {asked} cost together? Add step by step.\nAnswer:"
        return text, ((str(sum(numbers)), True),)

    def ask_frequent(self, words: Sequence[str]) -> tuple[str, Answer]:
        """Ask for the words that occur most."""
        text = (
            f"Question: Which {len(words)} things are named most often above?\n"
            f"Answer: The {len(words)} things named most often are:"
        )
        return text, tuple((word, True) for word in words)

    def count(self, text: str) -> int:
        """Tokens of a text, estimated."""
        return round(len(text.split()) * self._tokens_per_word)

    def score(self, text: str, answer: Answer) -> float:
        """Share of the scored words that the answer contains."""
        given = f" {plain(text)} "
        scored = [word for word, counts in answer if counts]
        return sum(f" {plain(word)} " in given for word in scored) / len(scored)


Language = ReferenceWords | English | Statements

LANGUAGES: dict[str, Language] = {
    language.name: language for language in (ReferenceWords(), HardWords(), English(), Statements())
}
"""Every language by name."""
