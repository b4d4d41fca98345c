"""What commands that run an engine over prompts share: the prompts, the engine, and their options."""

import argparse
import json
import logging
import os
import warnings
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffkv.cli.arguments import Listed, num_bytes
from diffkv.cli.engine_options import REFERENCE, SHIPPED, model_folder
from diffkv.cli.models import check_hub
from diffkv.quant import ConfigError

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "Question",
    "add_engine_options",
    "add_prompt_options",
    "device",
    "engine_arguments",
    "questions",
    "read_questions",
    "read_text",
    "shipped_prompts",
    "silence_engine",
]

DEFAULT_MAX_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer that is known to be right, if one is."""

    prompt: str
    answer: str | None = None

    def max_tokens(self, asked: int | None) -> int:
        """New tokens: what was asked for, else as many as the answer has words, else 64."""
        if asked is not None:
            return asked
        return DEFAULT_MAX_TOKENS if self.answer is None else len(self.answer.split())


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Declare the model, its memory, and how much is said."""
    parser.add_argument(
        "--model", default=REFERENCE, help="a folder or a model id (default: the shipped model)"
    )
    parser.add_argument(
        "--kv-memory",
        type=num_bytes,
        metavar="SIZE",
        help="KV budget, tables included: 512MiB, 2G, bytes … (vLLM: --kv-cache-memory-bytes; default: "
        "on a CPU what the prompts need at once, at most 4 GiB or one request of --max-model-len; on a "
        "GPU vLLM's own choice)",
    )
    parser.add_argument("--verbose", action="store_true", help="show the engine's log")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Declare where prompts come from."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", action=Listed, metavar="TEXT", help="prompts")
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a file of prompts: one a line, or JSON lines with "prompt" (default: shipped ones)',
    )


def questions(args: argparse.Namespace) -> list[Question]:
    """The prompts of a command line; without any, those that ship.

    Raises:
        ConfigError: a file that cannot be read, or no prompt.
    """
    if args.prompt:
        return [Question(text) for text in args.prompt]
    if args.prompts is not None:
        return read_questions(args.prompts)
    if args.model not in SHIPPED:
        raise ConfigError(
            "give --prompt or --prompts: the shipped prompts are for the shipped models"
        )
    return _parse(shipped_prompts())


def shipped_prompts() -> str:
    """The shipped prompts, one JSON object a line."""
    return (files("diffkv") / "data" / "prompts.jsonl").read_text()


def read_text(path: Path, flag: str) -> str:
    """A file's text.

    Raises:
        ConfigError: it cannot be read; names the option that it was given to.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {flag} {path}: {error}") from None


def read_questions(path: Path, flag: str = "--prompts") -> list[Question]:
    """One prompt a line, as plain text or as a JSON object.

    Raises:
        ConfigError: a file that cannot be read, or holds no prompt.
    """
    found = _parse(read_text(path, flag))
    if not found:
        raise ConfigError(f"{flag} {path} holds no prompt")
    return found


def _parse(text: str) -> list[Question]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if not line.startswith("{"):
            found.append(Question(line))
            continue
        try:
            row = json.loads(line)
            found.append(Question(str(row["prompt"]), _answer(row.get("answer"))))
        except (ValueError, KeyError) as error:
            raise ConfigError(f'line {number} is no JSON object with "prompt": {error}') from None
    return found


def _answer(given: object) -> str | None:
    """An answer as text; of a number its digits."""
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError(f"its answer must be a text or a number, got {json.dumps(given)}")
    if not str(given).strip():
        raise ValueError("its answer is empty: leave it out if none is known")
    return str(given)


def device() -> str:
    """Where an engine or a model runs: on a GPU if torch sees one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def engine_arguments(args: argparse.Namespace, **defaults: Any) -> dict[str, Any]:
    """Arguments of vLLM's engine: the model, its memory, and flags that were passed on.

    Args:
        args: with `model` and `flags`; `kv_memory` and `verbose` where the command has them.
        defaults: the command's, by vLLM's names; flags override them.

    Raises:
        ConfigError: a model that cannot be had, a flag that vLLM does not know, or memory given twice.
    """
    from diffkv.vllm_plugin.front.offline import check_model, engine_flags

    model = model_folder(args.model)
    check_model(model)
    check_hub(model)
    flags, kv_memory = engine_flags(args.flags), getattr(args, "kv_memory", None)
    memory = {} if kv_memory is None else {"kv_cache_memory_bytes": kv_memory}
    if memory.keys() & flags.keys():
        raise ConfigError(
            "--kv-memory and --kv-cache-memory-bytes are one option: give one of them"
        )
    return {
        "model": model,
        "enforce_eager": True,
        "use_tqdm_on_load": getattr(args, "verbose", False),
        **memory,
        **defaults,
        **flags,
    }


def silence_engine() -> None:
    """Keep off the console what every start of vLLM says, unless it is an error."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is ours
    # vLLM looks for Triton before it has set up its log, and wraps deprecated names of torch
    logging.getLogger("vllm.triton_utils").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
