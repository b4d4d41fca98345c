"""The command line: finds the command, parses its options, and turns a ConfigError into one line.

A command is a module of this package with `add_arguments(parser)` and `run(args) -> int`. It is imported
only when it is asked for, so that `diffkv layout` need not wait for an engine's imports. One with
`PASSES_FLAGS_ON` gets what it did not declare as `args.flags`, for an engine that refuses what it does
not know either.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from diffkv import __version__
from diffkv.cli.arguments import Once
from diffkv.quant import ConfigError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "bench": "measure kernels, the pool, throughput and serving, beside vLLM's own cache",
    "calibrate": "choose thresholds for a model within a loss that you allow",
    "demo": "see a real model answer with a compressed cache, and what that costs",
    "doctor": "check what this machine has: versions, plugin, compiler, kernels",
    "eval": "measure what answers lose against full precision: tasks, KL divergence",
    "generate": "answer prompts with a compressed cache, or compare it with an uncompressed one",
    "inspect": "show what each layer and head kept of a prompt",
    "layout": "show what a page holds and what a token costs",
    "plan": "show what fits a GPU's memory in each format, and whether compression pays",
    "report": "turn result files into tables and plots",
    "serve": "start vLLM's OpenAI server with a compressed cache",
}
"""Each command's module in this package, and its line in the help."""

USER_ERROR = 2


class _Parser(argparse.ArgumentParser):
    """Refuses what it does not know, abbreviations too, in one line and a hint; takes no value twice."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.register("action", None, Once)

    def error(self, message: str) -> NoReturn:
        refused = re.fullmatch(r"argument (\S+): (must be .*)", message)
        if refused:  # by a type of `arguments`
            raise ConfigError(" ".join(refused.groups()))
        self.exit(USER_ERROR, f"diffkv: {message}\nTry '{self.prog} --help'.\n")


def _top_parser() -> _Parser:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = _Parser(
        "diffkv",
        "A KV cache that keeps each token in the precision that its attention head needs.",
        f"commands:\n{lines}\n\n'diffkv COMMAND --help' lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"diffkv {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", choices=COMMANDS, help="see below")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: without the program's name; the process's own if None.

    Returns:
        The exit status: 2 if the user asked for something that cannot be done.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Only the first word is the top parser's: the rest is known to the command alone.
    top_parser = _top_parser()
    name = top_parser.parse_args(arguments[:1]).command
    if name is None:
        top_parser.error(f"name a command: {', '.join(COMMANDS)}")
    if "--verbose" not in arguments:
        # Read when torch is loaded: its C++ warns of how vLLM binds memory, at every start
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    command = importlib.import_module(f"diffkv.cli.{name}")
    parser = _Parser(f"diffkv {name}", COMMANDS[name])
    command.add_arguments(parser)
    try:
        if getattr(command, "PASSES_FLAGS_ON", False):
            args, flags = parser.parse_known_args(arguments[1:])
            args.flags = flags
        else:
            args = parser.parse_args(arguments[1:])
        status: int = command.run(args)
    except ConfigError as error:
        print(f"diffkv: {error}", file=sys.stderr)
        return USER_ERROR
    return status
