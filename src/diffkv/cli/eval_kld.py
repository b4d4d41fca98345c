"""The suite `kld` of `diffkv eval` through vLLM: its own caches beside DiffKV's."""

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffkv.cli import prompts
from diffkv.cli.arguments import Joined, Listed, num_tokens, positive
from diffkv.cli.engine_options import SHIPPED, cache_options, model_folder
from diffkv.cli.models import load_config
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.evaluation.vllm_kld import ComparedCache, Reading
    from diffkv.vllm_plugin.front.forcing import ForcedEngine
    from diffkv.vllm_plugin.options import Options

__all__ = ["add_arguments", "evaluate", "read_content"]

DEFAULT_AGAINST = "bf16,fp8"
DEFAULT_NUM_TEXTS = 4
DEFAULT_CONTEXT = 2048
MIN_KV_BYTES = 256 << 20
LEAST_STEPS = 2
BF16 = "bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only this suite has, with that engine."""
    group = parser.add_argument_group(
        "suite kld, --engine vllm",
        "every cache reads the same tokens, and its next-token distributions are compared with those of "
        "the model in float32",
    )
    group.add_argument(
        "--against",
        action=Joined,
        metavar="CACHES",
        help="caches beside the one that the options below describe: bf16 (the model in bf16, with its "
        "own cache), any --kv-cache-dtype of vLLM, or formats of ours such as k8v8-k4v4 (default: "
        f"{DEFAULT_AGAINST})",
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


def _check(args: argparse.Namespace) -> None:
    if args.methods is not None:
        raise ConfigError("--methods does not go with --suite kld --engine vllm: take --against")
    if args.steps < LEAST_STEPS:
        raise ConfigError(
            f"--steps must be at least {LEAST_STEPS} with --engine vllm, got {args.steps}"
        )
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
    prompts.silence_engine()
    options = cache_options(args)
    from diffkv.lab.evaluation import vllm_kld
    from diffkv.lab.provenance import collect
    from diffkv.lab.rows import Writer

    caches = _caches(args, options)
    job = vllm_kld.KldJob(args.model, _arguments(args), caches)
    writer = Writer(collect(prompts.device()), args.out, resume=args.resume)
    done = []
    for row in vllm_kld.rows(job, lambda engine: _reading(args, engine), writer, _progress(args)):
        done.append(row)
        if row.error is not None:
            print(f"diffkv: {row['cache']} is not there: {row.error}", file=sys.stderr)
        print(row.to_json(), flush=True)
    if not args.json:
        from diffkv.cli.eval_tables import print_distances

        print_distances([row for row in done if row.error is None])
    return 0


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
    words = _words(options)
    return [*(cache for cache in caches if cache.name != words), ComparedCache(words, {}, options)]


def _words(options: "Options") -> str:
    """The formats, and what differs from their defaults."""
    given = {name: value for name, value in options.to_dict().items() if name != "quant"}
    return " ".join([options.quant, *(f"{name}={value}" for name, value in given.items())])


def read_content(args: argparse.Namespace) -> str:
    """Content of --texts, or the shipped prompts.

    Raises:
        ConfigError: a file that cannot be read, or no file and a model that does not ship.
    """
    if args.texts is not None:
        return prompts.read_text(args.texts, "--texts")
    if args.model not in SHIPPED:
        raise ConfigError("give --texts: the shipped prompts are for the shipped models")
    return prompts.shipped_prompts()


def _reading(args: argparse.Namespace, engine: "ForcedEngine") -> "Reading":
    """Token ids: of given texts, of the shipped model's prompts, or of Python's documentation."""
    from diffkv.lab.evaluation.kld import read_texts
    from diffkv.lab.evaluation.vllm_kld import Reading

    if args.texts is None and args.model not in SHIPPED:
        from diffkv.lab.evaluation import english

        num = args.num_texts or DEFAULT_NUM_TEXTS
        return Reading(
            english.cut(engine.encode, num, args.contexts or [DEFAULT_CONTEXT]), args.steps
        )
    given = read_texts(read_content(args))[: args.num_texts]
    texts = [engine.encode(each.text) for each in given]
    if args.contexts is not None:
        texts = [text[:length] for length in args.contexts for text in texts if len(text) >= length]
    texts = [text[: engine.longest] for text in texts]
    shortest = min(map(len, texts), default=0)
    if shortest < _least_tokens(args):
        raise ConfigError(
            f"--steps {args.steps} needs texts of {max(_least_tokens(args), *(args.contexts or [0]))} "
            f"tokens, and the shortest has {shortest}: give longer ones, or lower --steps or --contexts"
        )
    return Reading(texts, args.steps)


def _progress(args: argparse.Namespace) -> Any:
    def report(name: str, done: int, total: int) -> None:
        if not args.json:
            print(f"diffkv: {name}, {done} of {total} texts", file=sys.stderr)

    return report
