"""English that every Python brings along: its language reference, as `help()` shows it."""

from collections.abc import Callable
from pydoc_data.topics import topics

from diffkv.quant import ConfigError

__all__ = ["cut", "topic", "topics"]


def topic(name: str) -> str:
    """The text of one topic."""
    return topics[name].strip()


def cut(encode: Callable[[str], list[int]], num_texts: int, lengths: list[int]) -> list[list[int]]:
    """Token ids of texts of given lengths, one after the other out of all topics in their order.

    Args:
        encode: a tokenizer's.
        num_texts: texts of each length.
        lengths: in tokens.

    Raises:
        ConfigError: there is not so much text.
    """
    ids = encode("\n\n".join(topic(name) for name in sorted(topics)))
    if num_texts * max(lengths) > len(ids):
        raise ConfigError(
            f"{num_texts} texts of {max(lengths)} tokens are more than the {len(ids)} tokens of "
            f"Python's documentation: ask for fewer, or give --texts"
        )
    return [ids[i * length : (i + 1) * length] for length in lengths for i in range(num_texts)]
