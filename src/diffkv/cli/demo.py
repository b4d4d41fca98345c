"""`diffkv demo`: a real model answers questions with several caches, and a screen shows the cost."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffkv.cli import generate, prompts
from diffkv.cli.arguments import at_least
from diffkv.cli.engine_options import add_cache_options, cache_options, model_folder
from diffkv.cli.models import load_config
from diffkv.fetch import MODELS, SMOLLM2
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from diffkv.lab.evaluation.side_by_side import Report, Sides
    from diffkv.vllm_plugin.options import Options

__all__ = ["add_arguments", "engine_arguments", "print_sides", "run"]

DEFAULT_MAX_TOKENS = 96
MAX_MODEL_LEN = 4096
REQUEST_TOKENS = 2048
FP8, DIFFKV = "vLLM fp8", "DiffKV"
GIB = 1 << 30
SHOWN_CHARACTERS = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model",
        default=SMOLLM2.name,
        help="a model that chats: a folder, a model id, or smollm2, which is fetched once (default)",
    )
    parser.add_argument(
        "--max-tokens",
        type=at_least(2),
        default=DEFAULT_MAX_TOKENS,
        help="most new tokens of an answer (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show the engine's log")
    add_cache_options(parser)


def run(args: argparse.Namespace) -> int:
    """Answer, and print; without the model that is fetched, the shipped one answers its own prompts."""
    try:
        folder = model_folder(args.model)
    except ConfigError as error:
        if args.model not in MODELS:
            raise
        print(f"diffkv: {error}", file=sys.stderr)
        print("diffkv: the toy model that ships with the package answers instead", file=sys.stderr)
        return _with_shipped_model(args)
    if not args.verbose:
        prompts.silence_engine()
    options = cache_options(args)
    from diffkv.lab.evaluation import side_by_side
    from diffkv.vllm_plugin.front.offline import check_model

    check_model(folder)
    others: dict[str, tuple[dict[str, Any], Options | None]] = {
        FP8: ({"kv_cache_dtype": "fp8"}, None),
        DIFFKV: ({}, options),
    }
    with _progress() as report:
        sides = side_by_side.answer(
            engine_arguments(folder), others, side_by_side.QUESTIONS, args.max_tokens, report
        )
    print_sides(args.model, sides, options)
    return 0


def _with_shipped_model(args: argparse.Namespace) -> int:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    shipped = parser.parse_args(["--compare"])
    for name, value in vars(args).items():
        if name not in ("model", "max_tokens"):
            setattr(shipped, name, value)
    shipped.flags = []
    return generate.run(shipped)


def engine_arguments(folder: str) -> dict[str, Any]:
    """What all engines get: float32, so that nothing but the cache differs."""
    return {
        "model": folder,
        "dtype": "float32",
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        "max_model_len": min(MAX_MODEL_LEN, load_config(folder).max_model_len),
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 2 * GIB,
    }


@contextmanager
def _progress() -> "Iterator[Report]":
    """A bar for each cache on a terminal, a line for each elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    bars: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(f"answering with {name}", total=total)
                if not console.is_terminal:
                    print(f"diffkv: answering with {name}", file=sys.stderr)
            progress.update(bars[name], completed=done, total=total)

        yield report


def print_sides(model: str, sides: "Sides", options: "Options") -> None:
    """Print what was asked and answered, and what each cache costs."""
    from rich.console import Console

    console = Console()
    console.print(
        f"\n{model} answers {len(sides.texts)} questions, each about a part of a State of the Union "
        f"message that precedes it ({min(sides.prompt_tokens):,} to {max(sides.prompt_tokens):,} "
        f"tokens): with its KV cache in full precision, in vLLM's fp8, and in DiffKV's "
        f"{options.quant}.\n"
    )
    console.print(_answers(sides))
    console.print(_costs(sides))
    for line in sides.missing:
        console.print(f"Not on this machine: {line}")
    steps = sum(sides.num_tokens) - len(sides.num_tokens)
    console.print(
        f"Full precision: the model and its cache in float32. KL: how far the probabilities of the "
        f"next token are from full precision's, in nats, at each of the {steps} tokens of its answers "
        f"after their first; 0 is no difference. Bytes count whole pages and blocks. "
        f"A request has {REQUEST_TOKENS:,} tokens."
    )


def _answers(sides: "Sides") -> "Table":
    """Each question, DiffKV's answer, and how long each cache says what full precision says."""
    from rich.table import Table

    from diffkv.cli.tables import short
    from diffkv.lab.evaluation.side_by_side import QUESTIONS

    table = Table("question", "answer with DiffKV")
    for cache in sides.caches:
        table.add_column(f"same tokens:\n{cache.name}", justify="right")
    own = next(cache.texts for cache in sides.caches if cache.texts)
    for row, num_tokens in enumerate(sides.num_tokens):
        same = [f"{cache.same_tokens[row]} of {num_tokens}" for cache in sides.caches]
        table.add_row(QUESTIONS[row].question, short(own[row], SHOWN_CHARACTERS), *same)
    return table


def _costs(sides: "Sides") -> "Table":
    from rich.table import Table

    first = sides.caches[0].use
    bf16 = first.bf16_bytes / first.tokens
    sizes = [bf16, *(cache.use.bytes_per_token for cache in sides.caches)]
    table = Table("the KV cache")
    for name in ("bf16", *(cache.name for cache in sides.caches)):
        table.add_column(name, justify="right")
    table.add_row("bytes a token, all layers", *(f"{size:,.0f}" for size in sizes))
    table.add_row("smaller than bf16", *(f"{bf16 / size:.2f}x" for size in sizes))
    table.add_row("smaller than fp8", *(f"{bf16 / 2 / size:.2f}x" for size in sizes))
    table.add_row("requests in 1 GiB", *(f"{GIB / size / REQUEST_TOKENS:.0f}" for size in sizes))
    table.add_row("mean KL from full precision", "", *(f"{c.kld_mean:.4f}" for c in sides.caches))
    table.add_row("same first choice", "", *(f"{c.same_top1:.1%}" for c in sides.caches))
    return table
