"""`diffkv generate`: answer prompts with a compressed cache, and say what it cost."""

import argparse
import json
import logging
import os
import warnings
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkv.cli.engine_options import (
    REFERENCE,
    SHIPPED,
    add_cache_options,
    cache_options,
    model_folder,
)
from diffkv.cli.models import check_hub
from diffkv.cli.option_types import Listed, num_bytes
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.vllm_plugin.front.offline import Result

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run", "silence_engine"]

PASSES_FLAGS_ON = True
"""Options that are not listed here are those of vLLM's engine."""

DEFAULT_MAX_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model", default=REFERENCE, help="a folder or a model id (default: the shipped model)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", action=Listed, metavar="TEXT", help="prompts")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help='a file of prompts: one a line, or JSON lines with "prompt" (default: shipped ones)',
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, help="new tokens for each prompt (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--ignore-eos", action="store_true", help="always make --max-tokens tokens")
    parser.add_argument(
        "--kv-memory", type=num_bytes, metavar="SIZE",
        help="KV budget, tables included: 512MiB, 2G, bytes … (vLLM: --kv-cache-memory-bytes; "
        "default: what the prompts need at once, at most 4 GiB or one request of --max-model-len)",
    )  # fmt: skip
    parser.add_argument(
        "--compare", action="store_true", help="answer with vLLM's own cache too, and compare"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--verbose", action="store_true", help="show the engine's log")
    add_cache_options(parser)
    parser.epilog = "Any other option is passed on to vLLM's engine: --dtype, --max-model-len, …"


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


def _questions(args: argparse.Namespace) -> list[Question]:
    if args.prompt:
        return [Question(text) for text in args.prompt]
    if args.prompts is None:
        if args.model not in SHIPPED:
            raise ConfigError(
                "give --prompt or --prompts: the shipped prompts are for the shipped models"
            )
        return _read_questions((files("diffkv") / "data" / "prompts.jsonl").read_text())
    try:
        text = args.prompts.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --prompts {args.prompts}: {error}") from None
    questions = _read_questions(text)
    if not questions:
        raise ConfigError(f"--prompts {args.prompts} holds no prompt")
    return questions


def _read_questions(text: str) -> list[Question]:
    """One prompt a line, as plain text or as a JSON object."""
    questions = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if not line.startswith("{"):
            questions.append(Question(line))
            continue
        try:
            row = json.loads(line)
            questions.append(Question(str(row["prompt"]), row.get("answer")))
        except (ValueError, KeyError) as error:
            raise ConfigError(f'line {number} is no JSON object with "prompt": {error}') from None
    return questions


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    from diffkv.vllm_plugin.front.offline import check_model, engine_flags

    model = model_folder(args.model)
    check_model(model)
    check_hub(model)
    flags = engine_flags(args.flags)
    memory = {} if args.kv_memory is None else {"kv_cache_memory_bytes": args.kv_memory}
    if memory.keys() & flags.keys():
        raise ConfigError(
            "--kv-memory and --kv-cache-memory-bytes are one option: give one of them"
        )
    return {
        "model": model,
        "enforce_eager": True,
        "use_tqdm_on_load": args.verbose,
        **memory,
        **flags,
    }


def silence_engine() -> None:
    """Keep off the console what every start of vLLM says, unless it is an error."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is ours
    # vLLM looks for Triton before it has set up its log, and wraps deprecated names of torch
    logging.getLogger("vllm.triton_utils").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


def run(args: argparse.Namespace) -> int:
    """Generate, compare if asked to, and print."""
    if not args.verbose:
        silence_engine()
    options = cache_options(args)
    questions = _questions(args)
    for name in ("max_tokens", "kv_memory"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    from diffkv.vllm_plugin.front.offline import generate

    engine = _engine(args)
    sampling = [
        {
            "temperature": args.temperature,
            "max_tokens": question.max_tokens(args.max_tokens),
            "ignore_eos": args.ignore_eos,
        }
        for question in questions
    ]
    prompts = [question.prompt for question in questions]
    stock = None
    if args.compare:
        plain = {**engine, "enable_prefix_caching": False}
        stock = generate(prompts, plain, sampling, None, progress=not args.json)
    ours = generate(prompts, engine, sampling, options, progress=not args.json)
    if args.json:
        print(json.dumps(_as_json(ours, stock)))
    else:
        from diffkv.cli.tables import print_result

        print_result([question.answer for question in questions], ours, stock)
    return 0


def _as_json(ours: "Result", stock: "Result | None") -> dict[str, Any]:
    assert ours.cache is not None
    result: dict[str, Any] = {
        "outputs": [asdict(answer) for answer in ours.answers],
        "cache": {**asdict(ours.cache), "preemptions": ours.preemptions},
    }
    if stock is not None:
        result["stock_outputs"] = [asdict(answer) for answer in stock.answers]
    return result
