"""English to read: State of the Union messages, which are the same on every machine."""

from collections.abc import Callable
from functools import cache
from itertools import takewhile, zip_longest
from pathlib import Path

from diffkv.fetch import fetch_addresses
from diffkv.quant import ConfigError

__all__ = ["SOURCE", "cut", "messages", "passage"]

SOURCE = "State of the Union messages"


def messages() -> dict[str, str]:
    """The messages by year and president, in the order of being read.

    Raises:
        ConfigError: they are not there yet and cannot be fetched.
    """
    return {file.stem: _read(file) for file in fetch_addresses()}


@cache
def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def passage(name: str, beginning: str, num_paragraphs: int) -> str:
    """Paragraphs of a message.

    Args:
        name: of the message.
        beginning: of the first paragraph.
        num_paragraphs: how many.
    """
    paragraphs = messages()[name].split("\n\n")
    first = next(i for i, text in enumerate(paragraphs) if text.startswith(beginning))
    return "\n\n".join(paragraphs[first : first + num_paragraphs])


def cut(encode: Callable[[str], list[int]], num_texts: int, lengths: list[int]) -> list[list[int]]:
    """Token ids of texts of given lengths: the beginnings of all messages, then what follows in each.

    So few texts are of different hands, and none goes on in another message. All have the tokenizer's
    opening.

    Args:
        encode: a tokenizer's.
        num_texts: texts of each length.
        lengths: in tokens.

    Raises:
        ConfigError: there is not so much text.
    """
    encoded = [encode(text) for text in messages().values()]
    shared = takewhile(
        lambda column: len(set(column)) == 1, zip(encode(""), *encoded, strict=False)
    )
    opening = [token for token, *_ in shared]
    bodies = [ids[len(opening) :] for ids in encoded]
    texts = []
    for length in lengths:
        pieces = _pieces(bodies, length - len(opening))
        if len(pieces) < num_texts:
            raise ConfigError(
                f"{SOURCE} give {len(pieces)} texts of {length} tokens, not {num_texts}: ask for "
                f"fewer or shorter ones, or give --texts"
            )
        texts += [opening + piece for piece in pieces[:num_texts]]
    return texts


def _pieces(bodies: list[list[int]], length: int) -> list[list[int]]:
    """The first tokens of each text, then the second of each that has so many, and so on."""
    pieces = (
        [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)] for ids in bodies
    )
    return [piece for turn in zip_longest(*pieces) for piece in turn if piece is not None]
