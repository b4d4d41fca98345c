"""The suite `kld` of `diffkv eval`: other engines' caches and formats beside DiffKV's."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffkv.cli import eval_hf, eval_methods, prompts, texts
from diffkv.cli.arguments import Joined
from diffkv.cli.engine_options import cache_options, model_folder
from diffkv.cli.models import load_config
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.evaluation.vllm_kld import ComparedCache
    from diffkv.lab.rows import Row, Writer
    from diffkv.vllm_plugin.options import Options

__all__ = ["add_arguments", "evaluate"]

DEFAULT_AGAINST = "bf16,fp8"
DEFAULT_STEPS = 128
MIN_KV_BYTES = 256 << 20
BF16 = "bf16"


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
    texts.add_text_options(group, DEFAULT_STEPS)


def _check(args: argparse.Namespace) -> None:
    if args.engine == "vllm" and args.methods is not None:
        raise ConfigError("--methods does not go with --suite kld --engine vllm: take --against")
    texts.check(args, DEFAULT_STEPS)


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
    content = texts.content(args)
    with eval_hf.loaded(args) as model:
        writer = _writer(args, model.model.device.type)
        reading = texts.reading(args, content, model)
        yield from kld.rows(model, args.model, caches, reading, writer, _progress(args))


def _vllm(args: argparse.Namespace) -> "Iterator[Row]":
    prompts.silence_engine()
    options = cache_options(args)
    from diffkv.lab.evaluation import vllm_kld

    caches, content = _caches(args, options), texts.content(args)
    job = vllm_kld.KldJob(args.model, _arguments(args, content), caches)
    writer = _writer(args, prompts.device())
    yield from vllm_kld.rows(
        job, lambda engine: texts.reading(args, content, engine), writer, _progress(args)
    )


def _arguments(args: argparse.Namespace, content: list[str] | None) -> dict[str, Any]:
    """What all engines share: room for all that is read at once, in float32."""
    folder = model_folder(args.model)
    model = load_config(folder)
    longest, at_once = max(args.contexts or [texts.DEFAULT_CONTEXT]), args.batch_size
    if args.contexts is None:
        if content is not None:
            lengths = _lengths(folder, content[: args.num_texts])
            longest, at_once = max(lengths), min(at_once, 2 * len(lengths))
        longest = min(longest, model.max_model_len or longest)
    tokens = at_once * (longest + args.steps + 128)
    elements = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return prompts.engine_arguments(
        args,
        dtype=args.dtype or ("bfloat16" if prompts.device() == "cuda" else "float32"),
        max_num_seqs=args.batch_size,
        max_model_len=min(model.max_model_len, longest + args.steps) or None,
        kv_cache_memory_bytes=max(MIN_KV_BYTES, tokens * elements * 4),
    )


def _lengths(folder: str, content: list[str]) -> list[int]:
    """Tokens of texts."""
    from diffkv.lab.evaluation.hf_runs import tokenizer_of

    try:
        encode = tokenizer_of(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot load the tokenizer of {folder}: {reason}") from None
    return [len(encode(text, verbose=False).input_ids) for text in content]


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


def _progress(args: argparse.Namespace) -> Any:
    def report(name: str, done: int, total: int) -> None:
        if not args.json:
            print(f"diffkv: {name}, {done} of {total} texts", file=sys.stderr)

    return report
