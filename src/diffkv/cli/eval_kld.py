"""The suite `kld` of `diffkv eval`: other engines' caches and formats beside DiffKV's."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffkv.cli import eval_hf, eval_methods, prompts
from diffkv.cli.arguments import Joined, Listed, num_tokens, positive
from diffkv.cli.engine_options import SHIPPED, cache_options, model_folder
from diffkv.cli.models import load_config
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.evaluation.distances import Reading
    from diffkv.lab.evaluation.vllm_kld import ComparedCache
    from diffkv.lab.rows import Row, Writer
    from diffkv.vllm_plugin.options import Options

__all__ = ["add_arguments", "evaluate"]

DEFAULT_AGAINST = "bf16,fp8"
DEFAULT_NUM_TEXTS = 4
DEFAULT_CONTEXT = 2048
DEFAULT_STEPS, LEAST_STEPS = 128, 2
MIN_KV_BYTES = 256 << 20
BF16 = "bf16"


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only this suite has."""
    group = parser.add_argument_group(
        "suite kld",
        "every cache reads the same tokens, and its next-token distributions are compared with those of "
        "full precision",
    )
    group.add_argument(
        "--against",
        action=Joined,
        metavar="CACHES",
        help="caches beside the one that the options below describe: formats of ours such as k8v8-k4v4; "
        "in vLLM bf16 (the model in bf16, with its own cache) and any --kv-cache-dtype of vLLM; in "
        "transformers formats of other engines, such as q8_0 (docs/evaluation.md; default: nothing, in "
        f"vLLM {DEFAULT_AGAINST})",
    )
    group.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help='one text a line, or JSON lines with "text" (default: the language reference of Python; of '
        "a shipped model its prompts)",
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
        default=DEFAULT_STEPS,
        help="compared steps at the end of each text (default: %(default)s)",
    )


def _check(args: argparse.Namespace) -> None:
    if args.engine == "vllm" and args.methods is not None:
        raise ConfigError("--methods does not go with --suite kld --engine vllm: take --against")
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


def evaluate(args: argparse.Namespace) -> int:
    """Compare the caches, and print a JSON line for each and a table of all."""
    _check(args)
    done = []
    for row in _vllm(args) if args.engine == "vllm" else _hf(args):
        done.append(row)
        if row.error is not None:
            print(f"diffkv: {row['cache']} is not there: {row.error}", file=sys.stderr)
        print(row.to_json(), flush=True)
    if not args.json:
        from diffkv.cli.eval_tables import print_distances

        print_distances([row for row in done if row.error is None])
    return 0


def _writer(args: argparse.Namespace, device: str) -> "Writer":
    from diffkv.lab.provenance import collect
    from diffkv.lab.rows import Writer

    return Writer(collect(device), args.out, resume=args.resume)


def _hf(args: argparse.Namespace) -> "Iterator[Row]":
    from diffkv.lab.evaluation import kld

    caches = eval_methods.caches(args)
    content = _content(args)
    with eval_hf.loaded(args) as model:
        writer = _writer(args, model.model.device.type)
        reading = _reading(args, content, model)
        yield from kld.rows(model, args.model, caches, reading, writer, _progress(args))


def _vllm(args: argparse.Namespace) -> "Iterator[Row]":
    prompts.silence_engine()
    options = cache_options(args)
    from diffkv.lab.evaluation import vllm_kld

    job = vllm_kld.KldJob(args.model, _arguments(args), _caches(args, options))
    content = _content(args)
    writer = _writer(args, prompts.device())
    yield from vllm_kld.rows(
        job, lambda engine: _reading(args, content, engine), writer, _progress(args)
    )


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What all engines share: room for all that is read at once, in float32."""
    model = load_config(model_folder(args.model))
    longest = max(args.contexts or [DEFAULT_CONTEXT])
    if args.model in SHIPPED and args.contexts is None:
        longest = model.max_model_len
    tokens = args.batch_size * (longest + args.steps + 128)
    elements = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return prompts.engine_arguments(
        args,
        dtype=args.dtype or ("bfloat16" if prompts.device() == "cuda" else "float32"),
        max_num_seqs=args.batch_size,
        max_model_len=min(model.max_model_len, longest + args.steps) or None,
        kv_cache_memory_bytes=max(MIN_KV_BYTES, tokens * elements * 4),
    )


def _caches(args: argparse.Namespace, options: "Options") -> "list[ComparedCache]":
    """The caches that --against names, then the one that the options describe."""
    from diffkv.lab.evaluation.vllm_kld import ComparedCache
    from diffkv.vllm_plugin.front.forcing import cache_dtypes

    caches = []
    for name in (args.against or DEFAULT_AGAINST).split(","):
        if name == BF16:
            caches.append(ComparedCache(name, {"dtype": "bfloat16"}))
        elif name in cache_dtypes():
            caches.append(ComparedCache(name, {"kv_cache_dtype": name}))
        else:
            try:
                ours = replace(options, quant=name, alpha_high=None)
            except ConfigError as error:
                names = ", ".join(cache_dtypes())
                raise ConfigError(
                    f"--against {name}: neither {BF16}, nor a cache of vLLM's ({names}), nor formats of "
                    f"ours ({error})"
                ) from None
            caches.append(ComparedCache(name, {}, ours))
    words = eval_methods.words(options)
    return [*(cache for cache in caches if cache.name != words), ComparedCache(words, {}, options)]


def _content(args: argparse.Namespace) -> str | None:
    """Content of --texts, or the prompts of a shipped model; None: Python's documentation is read.

    Raises:
        ConfigError: a file that cannot be read.
    """
    if args.texts is not None:
        return prompts.read_text(args.texts, "--texts")
    return prompts.shipped_prompts() if args.model in SHIPPED else None


def _reading(args: argparse.Namespace, content: str | None, reader: _Reader) -> "Reading":
    """Token ids of what is to be read."""
    from diffkv.lab.evaluation.distances import Reading, read_texts

    longest = max(args.contexts or [0])
    if longest > reader.longest:
        raise ConfigError(
            f"--contexts must be at most {reader.longest} for {args.model}, got {longest}"
        )
    if content is None:
        from diffkv.lab.evaluation import english

        num = args.num_texts or DEFAULT_NUM_TEXTS
        return Reading(
            english.cut(reader.encode, num, args.contexts or [DEFAULT_CONTEXT]), args.steps
        )
    texts = [reader.encode(text) for text in read_texts(content)[: args.num_texts]]
    if args.contexts is not None:
        texts = [text[:length] for length in args.contexts for text in texts if len(text) >= length]
    texts = [text[: reader.longest] for text in texts]
    shortest = min(map(len, texts), default=0)
    if shortest < _least_tokens(args):
        raise ConfigError(
            f"--steps {args.steps} needs texts of {max(_least_tokens(args), longest)} "
            f"tokens, and the shortest has {shortest}: give longer ones, or lower --steps or --contexts"
        )
    return Reading(texts, args.steps)


def _progress(args: argparse.Namespace) -> Any:
    def report(name: str, done: int, total: int) -> None:
        if not args.json:
            print(f"diffkv: {name}, {done} of {total} texts", file=sys.stderr)

    return report
