"""Texts that distances from full precision are measured on: their options, and how they are read."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffkv.cli import prompts
from diffkv.cli.arguments import Listed, num_tokens, positive
from diffkv.cli.engine_options import SHIPPED
from diffkv.quant import ConfigError
from diffkv.segments import SEGMENT

if TYPE_CHECKING:
    from diffkv.lab.evaluation.distances import Reading

__all__ = ["DEFAULT_CONTEXT", "add_text_options", "check", "content", "reading", "source"]

DEFAULT_NUM_TEXTS = 4
DEFAULT_CONTEXT = 3 * SEGMENT // 2
"""The second half of a segment reads the first one as it is stored, as longer prompts do."""
LEAST_STEPS = 2
JSON_LINES = ".jsonl"


class _Reader(Protocol):
    """A model that texts are read with.

    Attributes:
        longest: most tokens that it reads.
    """

    @property
    def longest(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's own opening."""
        ...


def add_text_options(group: argparse._ArgumentGroup, steps: int) -> None:
    """Declare what is read.

    Args:
        group: takes the options.
        steps: the command's default of --steps, for its help.
    """
    group.add_argument(
        "--texts",
        type=Path,
        nargs="+",
        action=Listed,
        metavar="PATH",
        help='files with one text a line, or JSON lines with "text"; of a folder each file is one text, '
        f"but for {JSON_LINES} (default: State of the Union messages, which are fetched once; of a "
        "shipped model its prompts)",
    )
    group.add_argument(
        "--contexts",
        type=num_tokens,
        nargs="+",
        action=Listed,
        metavar="TOKENS",
        help="lengths of the texts: each is cut out of what there is to read (default: "
        f"{DEFAULT_CONTEXT}; the shipped model's prompts are read whole)",
    )
    group.add_argument(
        "--num-texts",
        type=positive,
        metavar="N",
        help=f"texts of each length (default: {DEFAULT_NUM_TEXTS}, or all that --texts has)",
    )
    group.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=f"compared steps at the end of each text (default: {steps})",
    )


def check(args: argparse.Namespace, steps: int) -> None:
    """Refuse what no texts could be read with; --steps gets its default.

    Raises:
        ConfigError: too few steps, or texts too short for them.
    """
    args.steps = args.steps or steps
    if args.steps < LEAST_STEPS:
        raise ConfigError(f"--steps must be at least {LEAST_STEPS}, got {args.steps}")
    least = _least_tokens(args)
    for context in args.contexts or ():
        if context < least:
            raise ConfigError(
                f"--contexts must be at least {least} for --steps {args.steps}, got {context}"
            )


def _least_tokens(args: argparse.Namespace) -> int:
    """Tokens of a text that can be read: its prompt is as long as what is compared."""
    return 2 * args.steps + 2


def source(args: argparse.Namespace) -> str:
    """A name for what is read."""
    if args.texts is not None:
        return ", ".join(path.name for path in args.texts)
    if args.model in SHIPPED:
        return "the shipped prompts"
    from diffkv.lab.evaluation import english

    return english.SOURCE


def content(args: argparse.Namespace) -> list[str] | None:
    """Texts of --texts, or the prompts of a shipped model; None: messages are cut, and are there now.

    Raises:
        ConfigError: a file that cannot be read, or has no text; or the messages cannot be fetched.
    """
    from diffkv.lab.evaluation import english
    from diffkv.lab.evaluation.distances import read_texts

    if args.texts is not None:
        return [text for path in args.texts for text in _texts(path)]
    if args.model in SHIPPED:
        return read_texts(prompts.shipped_prompts())
    try:
        english.messages()
    except ConfigError as error:
        raise ConfigError(f"{error}; --texts gives others") from None
    return None


def _texts(path: Path) -> list[str]:
    """Those of a file, or of the files of a folder."""
    from diffkv.lab.evaluation.distances import read_texts

    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file()]
        if not files:
            raise ConfigError(f"--texts {path} is a folder without files")
        return [
            text
            for file in files
            for text in (_texts(file) if file.suffix == JSON_LINES else [_whole(file)])
        ]
    try:
        return read_texts(_whole(path))
    except ConfigError as error:
        raise ConfigError(f"{error} (--texts {path})") from None


def _whole(path: Path) -> str:
    return prompts.read_text(path, "--texts")


def reading(args: argparse.Namespace, texts: list[str] | None, reader: _Reader) -> "Reading":
    """Token ids of what is to be read.

    Args:
        args: the command line's.
        texts: from `content`.
        reader: the model.

    Raises:
        ConfigError: texts that are too short, or longer than the model reads.
    """
    from diffkv.lab.evaluation.distances import Reading

    longest = max(args.contexts or [0])
    if longest > reader.longest:
        raise ConfigError(
            f"--contexts must be at most {reader.longest} for {args.model}, got {longest}"
        )
    if texts is None:
        from diffkv.lab.evaluation import english

        num = args.num_texts or DEFAULT_NUM_TEXTS
        contexts = args.contexts or [min(DEFAULT_CONTEXT, reader.longest)]
        return Reading(english.cut(reader.encode, num, contexts), args.steps)
    ids = [reader.encode(text)[: reader.longest] for text in texts]
    if args.contexts is None:
        chosen = ids[: args.num_texts]
        if (shortest := min(map(len, chosen))) < _least_tokens(args):
            raise ConfigError(
                f"--steps {args.steps} needs texts of {_least_tokens(args)} tokens, and the shortest "
                f"has {shortest}: give longer ones, or lower --steps"
            )
        return Reading(chosen, args.steps)
    if (most := max(map(len, ids))) < longest:
        raise ConfigError(f"no text has {longest} tokens, the longest {most}: lower --contexts")
    chosen = []
    for length in args.contexts:
        enough = [each[:length] for each in ids if len(each) >= length]
        chosen += enough[: args.num_texts]
    return Reading(chosen, args.steps)
