"""Tokens of the shipped models: the words of `diffkv.lab.evaluation.languages`, and signs."""

from diffkv.lab.evaluation.languages import ReferenceWords

WORDS = ReferenceWords()
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SIGNS = (PAD, BOS, EOS, ";", "?", "@", "copy", "again", "sum", ".")
MULTIPLE = 16


def _vocabulary() -> tuple[str, ...]:
    numbers = [f"n{number}" for number in WORDS.numbers]
    words = [*SIGNS, *WORDS.keys, *WORDS.values, *numbers, *WORDS.words, UNKNOWN]
    return (*words, *(f"<r{i}>" for i in range(-len(words) % MULTIPLE)))


VOCABULARY = _vocabulary()
"""The text of every token, in the order of ids."""

TOKEN_IDS = {word: token_id for token_id, word in enumerate(VOCABULARY)}
