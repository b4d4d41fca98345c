"""`diffkv eval`: what answers lose when the cache is compressed, against full precision."""

import argparse
import importlib.util
import sys
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from diffkv import policies
from diffkv.cli import eval_kld, eval_lm
from diffkv.cli.engine_options import (
    REFERENCE,
    SHIPPED,
    add_cache_options,
    cache_options,
    model_folder,
)
from diffkv.policy import Thresholds
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    import torch

    from diffkv.lab.evaluation.results import Run, TaskRow
    from diffkv.lab.evaluation.runs import CacheSpec
    from diffkv.lab.evaluation.synth import Plan

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "read_content", "run"]

PASSES_FLAGS_ON = True
"""With the suite lm-eval: options that are not listed here are those of vLLM's engine."""

SUITES = ("synth", "kld", eval_lm.SUITE)
DEFAULT_NUM_SAMPLES = 16
DEFAULT_TOKENS = 1024
DEFAULT_STEPS = 128
DEFAULT_BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--suite", choices=SUITES, default=SUITES[0],
        help="synth: generated tasks; kld: distances of next-token distributions; lm-eval: real "
        "benchmarks in vLLM (default: synth)",
    )  # fmt: skip
    parser.add_argument(
        "--model", default=REFERENCE, help="a folder or a model id (default: the shipped model)"
    )
    parser.add_argument(
        "--engine", choices=("hf", "vllm"), default="hf",
        help="vllm: policies with thresholds and none; synth asks at the end of the prompt; kld "
        "compares vLLM's own caches too (default: hf)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the model (default: float32 on a CPU, bfloat16 on a GPU)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the model (default: the GPU)")
    parser.add_argument(
        "--threads", type=int,
        help="CPU threads of --engine hf (default: 1 for the shipped model, which is too small to share "
        "out; torch's own choice for others)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH, help="samples at once")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object there too")
    parser.add_argument("--json", action="store_true", help="only the JSON object, no table")
    group = parser.add_argument_group("suite synth")
    group.add_argument("--tasks", help="names, separated by commas (default: all of the language)")
    group.add_argument("--settings", help="easy, hard or easy,hard (default: what the engine can)")
    group.add_argument(
        "--language", help="of the tasks: reference, reference-128, english (default: by the model)"
    )
    group.add_argument(
        "--n",
        type=int,
        default=DEFAULT_NUM_SAMPLES,
        help="samples of a task (default: %(default)s)",
    )
    group.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, help="of a prompt (default: %(default)s)"
    )
    group = parser.add_argument_group("suite kld")
    group.add_argument(
        "--texts", type=Path, metavar="FILE",
        help='one text a line, or JSON lines with "text" (default: the shipped prompts)',
    )  # fmt: skip
    group.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS,
        help="most compared steps of a text (default: %(default)s)",
    )  # fmt: skip
    eval_kld.add_arguments(parser)
    eval_lm.add_arguments(parser)
    add_cache_options(
        parser,
        f"what decides: {', '.join(policies.POLICIES)}; with settings as in "
        "topk:keep=0.25,sinks=4 or paper:distinct=0.75 (default: paper)",
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse before anything is loaded."""
    for package in ("transformers", "pydantic"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"diffkv eval needs {package}: pip install 'diffkv[eval]'")
    for name, least in (
        ("n", 2),
        ("tokens", 256),
        ("steps", 1),
        ("batch_size", 1),
        ("seed", 0),
        ("threads", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be at least {least}, got {value}")
    if args.suite != eval_lm.SUITE:
        if args.flags:
            raise ConfigError(
                f"unknown option {args.flags[0]}: only --suite lm-eval passes some on"
            )
        for name in ("limit", "thinking", "run_code"):
            if getattr(args, name):
                raise ConfigError(f"--{name.replace('_', '-')} is for --suite {eval_lm.SUITE}")
    if args.suite != "kld" and args.texts is not None:
        raise ConfigError("--texts is for --suite kld")
    for name in ("device", "threads"):
        if args.engine == "vllm" and getattr(args, name) is not None:
            raise ConfigError(f"--{name} is for --engine hf: vLLM chooses for itself")
    if (args.suite, args.engine) != ("kld", "vllm"):
        for name in ("against", "contexts", "num_texts"):
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is for --suite kld --engine vllm")
    if args.out is not None and not args.out.parent.is_dir():
        raise ConfigError(f"cannot write --out {args.out}: there is no folder {args.out.parent}")


def _spec(args: argparse.Namespace) -> "CacheSpec":
    """The cache that was asked for."""
    from diffkv.lab.evaluation.runs import CacheSpec

    options = cache_options(args, takes_policy=False)
    policy = policies.parse(args.policy or options.policy)
    if not policy.uses_thresholds and (args.alpha_high, args.alpha_low) != (None, None):
        raise ConfigError(f"policy {policy} has no thresholds: leave out --alpha-high, --alpha-low")
    return CacheSpec(
        options.quant_config(), policy,
        options.thresholds() if policy.uses_thresholds else Thresholds(),
        options.window, options.page_bytes, options.kernels, options.rotation(),
    )  # fmt: skip


def _device_and_dtype(args: argparse.Namespace) -> "tuple[str, torch.dtype]":
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; leave it out, or use cpu")
    name = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    dtype: torch.dtype = getattr(torch, name)
    return device, dtype


def read_content(args: argparse.Namespace) -> str:
    """What --texts names, or the shipped prompts."""
    if args.texts is None:
        if args.model != REFERENCE:
            raise ConfigError("give --texts: the shipped prompts are for the shipped model")
        return (files("diffkv") / "data" / "prompts.jsonl").read_text()
    try:
        content: str = args.texts.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --texts {args.texts}: {error}") from None
    return content


def _plan(args: argparse.Namespace, vocabulary: Collection[str]) -> "Plan":
    from diffkv.lab.evaluation.runs import language_of
    from diffkv.lab.evaluation.synth import Plan

    only = "easy" if args.engine == "vllm" else None
    own = args.model if args.model in SHIPPED else None
    return Plan.choose(
        language_of(vocabulary, args.language or own), args.tasks, args.settings or only,
        args.tokens, args.n, args.seed,
    )  # fmt: skip


def _hf(args: argparse.Namespace, spec: "CacheSpec") -> "Run":
    import torch

    from diffkv.lab.evaluation import hf_runs
    from diffkv.lab.evaluation.kld import read_texts
    from diffkv.lab.evaluation.runs import HFRun

    texts = read_texts(read_content(args)) if args.suite == "kld" else []
    device, dtype = _device_and_dtype(args)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or (1 if args.model == REFERENCE else before))
    try:
        model = hf_runs.load(model_folder(args.model), dtype, args.batch_size, device)
        runner = HFRun(model, args.model)
        if args.suite == "kld":
            return runner.kld(spec, texts, args.steps)
        return runner.tasks(spec, _plan(args, model.vocabulary), lambda row: _report(args, row))
    finally:
        torch.set_num_threads(before)


def _report(args: argparse.Namespace, row: "TaskRow") -> None:
    """Say on standard error what is done."""
    if not args.json:
        print(f"diffkv: {row.task} {row.setting}", file=sys.stderr)


def _vllm(args: argparse.Namespace, spec: "CacheSpec") -> "Run":
    from diffkv.cli.generate import REFERENCE_KV_MEMORY_BYTES, silence_engine
    from diffkv.vllm_plugin.front.offline import check_model

    silence_engine()
    folder = model_folder(args.model)
    check_model(folder)
    from diffkv.lab.evaluation.hf_runs import vocabulary_of
    from diffkv.lab.evaluation.vllm_runs import run_tasks

    engine = {
        "model": folder,
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        "max_num_seqs": args.batch_size,
        **({"kv_cache_memory_bytes": REFERENCE_KV_MEMORY_BYTES} if args.model == REFERENCE else {}),
        **({"dtype": args.dtype} if args.dtype else {}),
    }
    return run_tasks(args.model, engine, spec, _plan(args, vocabulary_of(folder)))


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print a table and one JSON object."""
    _check(args)
    if (args.suite, args.engine) == ("kld", "vllm"):
        return eval_kld.evaluate(args)
    if args.suite == eval_lm.SUITE:
        result = eval_lm.evaluate(args)
    else:
        spec = _spec(args)
        result = _vllm(args, spec) if args.engine == "vllm" else _hf(args, spec)
    if not args.json:
        from diffkv.cli.eval_tables import print_run

        print_run(result)
    text = result.model_dump_json()
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)
    return 0
