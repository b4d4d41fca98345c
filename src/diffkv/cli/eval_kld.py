"""The suite `kld` of `diffkv eval` through vLLM: its own caches beside DiffKV's."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkv.cli.engine_options import REFERENCE, cache_options, model_folder
from diffkv.cli.models import load_config
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.evaluation.vllm_kld import CacheDistances, ComparedCache, Reading
    from diffkv.vllm_plugin.front.forcing import ForcedEngine
    from diffkv.vllm_plugin.options import Options

__all__ = ["add_arguments", "evaluate"]

DEFAULT_AGAINST = "bf16,fp8"
DEFAULT_NUM_TEXTS = 4
DEFAULT_CONTEXT = 2048
MIN_KV_BYTES = 256 << 20
BF16 = "bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only this suite has, with that engine."""
    group = parser.add_argument_group(
        "suite kld, --engine vllm",
        "every cache reads the same tokens, and its next-token distributions are compared with those of "
        "the model in float32; --out FILE gets a line as soon as a cache is done, and caches that it "
        "has are not measured again",
    )
    group.add_argument(
        "--against",
        metavar="CACHES",
        help="caches beside the one that the options below describe: bf16 (the model in bf16, with its "
        "own cache), any --kv-cache-dtype of vLLM, or formats of ours such as k8v8-k4v4 (default: "
        f"{DEFAULT_AGAINST})",
    )
    group.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="lengths of the texts: each is cut out of what there is to read (default: "
        f"{DEFAULT_CONTEXT}; the shipped model's prompts are read whole)",
    )
    group.add_argument(
        "--num-texts",
        type=int,
        metavar="N",
        help=f"texts of each length (default: {DEFAULT_NUM_TEXTS}, or all that --texts has)",
    )


def _check(args: argparse.Namespace) -> None:
    for name, least in (("num_texts", 1), ("steps", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
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
    """Compare the caches, and print a table and one JSON object."""
    from diffkv.cli.generate import silence_engine
    from diffkv.vllm_plugin.front.offline import check_model

    _check(args)
    silence_engine()
    folder = model_folder(args.model)
    check_model(folder)
    options = cache_options(args)
    from diffkv.lab.evaluation import vllm_kld
    from diffkv.lab.evaluation.runs import provenance

    where = provenance(_device(), ("torch",))
    job = vllm_kld.KldJob(
        args.model, _arguments(args, folder), _caches(args, options), where.commit
    )
    refused: list[str] = []

    def refuse(name: str, reason: str) -> None:
        refused.append(f"{name} is not there: {reason}")
        print(f"diffkv: {refused[-1]}", file=sys.stderr)

    done = []
    for row in vllm_kld.rows(
        job, lambda engine: _reading(args, engine), _known(args.out), _progress(args), refuse
    ):
        done.append(row)
        _keep(args.out, row)
    result = {
        "rows": [row.model_dump() for row in done],
        "not_there": refused,
        "provenance": where.model_dump(),
    }
    if not args.json:
        from diffkv.cli.eval_tables import print_distances

        print_distances(done)
    print(json.dumps(result))
    return 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _arguments(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What all engines share: room for all that is read at once, in float32."""
    model = load_config(folder)
    longest = max(args.contexts or [DEFAULT_CONTEXT])
    if args.model == REFERENCE and args.contexts is None:
        longest = model.max_model_len
    tokens = args.batch_size * (longest + args.steps + 128)
    return {
        "model": folder,
        "dtype": args.dtype or ("bfloat16" if _device() == "cuda" else "float32"),
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        "seed": args.seed,
        "max_num_seqs": args.batch_size,
        "max_model_len": min(model.max_model_len, longest + args.steps) or None,
        "kv_cache_memory_bytes": max(MIN_KV_BYTES, tokens * model.kv_elements_per_token * 4),
    }


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


def _reading(args: argparse.Namespace, engine: "ForcedEngine") -> "Reading":
    """Token ids: of given texts, of the shipped model's prompts, or of Python's documentation."""
    from diffkv.cli.eval import read_content
    from diffkv.lab.evaluation.kld import read_texts
    from diffkv.lab.evaluation.vllm_kld import Reading

    if args.texts is None and args.model != REFERENCE:
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


def _known(out: Path | None) -> "list[CacheDistances]":
    """Rows of an earlier run.

    Raises:
        ConfigError: a file of something else.
    """
    from pydantic import ValidationError

    from diffkv.lab.evaluation.vllm_kld import CacheDistances

    if out is None or not out.exists():
        return []
    try:
        return [CacheDistances.model_validate_json(line) for line in out.read_text().splitlines()]
    except (ValidationError, UnicodeDecodeError):
        raise ConfigError(f"--out {out} holds other results: name another file") from None


def _keep(out: Path | None, row: "CacheDistances") -> None:
    """Append a row that the file has not."""
    if out is None or row.key in [known.key for known in _known(out)]:
        return
    with out.open("a") as file:
        file.write(row.model_dump_json() + "\n")


def _progress(args: argparse.Namespace) -> Any:
    def report(name: str, done: int, total: int) -> None:
        if not args.json:
            print(f"diffkv: {name}, {done} of {total} texts", file=sys.stderr)

    return report
