"""`diffkv bench`: measure kernels, the pool's own work, engines and servers."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkv.cli import prompts
from diffkv.cli.bench_options import KIB, RANDOM, add_arguments
from diffkv.cli.engine_options import model_folder
from diffkv.cli.models import check_hub
from diffkv.lab.bench.loads import LOADS, Sizes
from diffkv.quant import ConfigError, QuantConfig

if TYPE_CHECKING:
    from diffkv.lab.bench.throughput import Setting
    from diffkv.lab.rows import Writer

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""`throughput`, `map` and `serving` pass to vLLM what is not listed here; the others refuse it."""

FULL_GRID = {"ctx": [KIB, 4 * KIB, 16 * KIB, 64 * KIB], "batch": [1, 8, 32, 128], "group": [4, 8]}
SMOKE_REPEATS = 3
SHIPPED = "shipped"


def run(args: argparse.Namespace) -> int:
    """Measure."""
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "attention": _attention,
        "manager": _manager,
        "throughput": _throughput,
        "map": _map,
        "serving": _serving,
    }
    if args.flags and args.bench in ("attention", "manager"):
        raise ConfigError(f"diffkv bench {args.bench} has no option {args.flags[0]}: see --help")
    quants = args.quant if isinstance(args.quant, list) else [args.quant]
    for quant in quants:
        QuantConfig.parse(quant)
    commands[args.bench](args)
    return 0


def _prepare_device(args: argparse.Namespace) -> None:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here: leave out --device cuda")
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)


def _writer(args: argparse.Namespace, device: str) -> "Writer":
    from diffkv.lab import plots
    from diffkv.lab.provenance import collect
    from diffkv.lab.rows import Writer

    if getattr(args, "plot", None):
        plots.require()  # before anything is measured
    here = collect(device)
    if "DIFFKV_COMMIT" in os.environ:  # sources without their repository
        here = replace(here, commit=os.environ["DIFFKV_COMMIT"])
    return Writer(here, args.out, args.json)


def _attention(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import attention

    if args.cpu_time and (args.device, args.threads) != ("cpu", 1):
        raise ConfigError("--cpu-time is the time of one thread of a CPU: add --threads 1")
    _prepare_device(args)
    if args.full:
        vars(args).update(FULL_GRID, ragged="both", tiers=["high", "low", "mix"])
    if args.smoke:
        vars(args).update(ctx=[KIB], batch=[1, 2], repeats=SMOKE_REPEATS, ragged="both")
    ragged = {"no": [False], "yes": [True], "both": [False, True]}[args.ragged]
    grid = attention.Grid(
        args.quant, args.tiers, args.ctx, args.batch, args.group, ragged, args.kv_heads,
        args.head_dim, args.repeats, args.warm,
    )  # fmt: skip
    clock = time.thread_time if args.cpu_time else time.perf_counter
    attention.run(grid, args.device, _writer(args, args.device), clock)


def _manager(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import pool

    _prepare_device(args)
    if args.smoke:
        vars(args).update(layers=4, requests=2, steps=3)
    contents = pool.Contents(
        args.quant, args.layers, args.kv_heads, args.requests, head_dim=args.head_dim
    )
    writer = _writer(args, args.device)
    pool.run(contents, args.device, writer, args.steps, args.full, small=args.smoke)


def _options(args: argparse.Namespace, drops: bool | None = None) -> list[dict[str, Any]]:
    """DiffKV's options for each quant; what they do not take is refused before anything runs."""
    from diffkv.vllm_plugin.options import Options

    options = []
    for quant in args.quant:
        given = {
            "quant": quant, "alpha_high": args.alpha_high, "alpha_low": args.alpha_low,
            "window": args.window, "drops": drops,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        Options.parse(given)
        options.append(given)
    return options


def _model(args: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The model's folder or id, arguments of the engine for it, and its `config.json`."""
    from diffkv.lab.bench import models

    if args.model is None:
        name = args.random_weights or "bench-small"
        load_format = models.write_model(name, folder)
        return str(folder), {"load_format": load_format}, models.find(name)
    from diffkv.vllm_plugin.front.offline import check_model

    model = model_folder(args.model)
    check_model(model)
    check_hub(model)
    config = Path(model) / "config.json"
    return model, {}, json.loads(config.read_text()) if config.is_file() else {}


def _kv_bytes(args: argparse.Namespace, config: dict[str, Any], longest: int) -> int:
    from diffkv.lab.bench.throughput import four_requests

    if args.kv_bytes:
        return int(args.kv_bytes)
    if not config:
        raise ConfigError("a model id needs --kv-bytes: the sizes of its cache are not known here")
    return four_requests(config, longest)


def _set_sizes(args: argparse.Namespace) -> None:
    """Sizes that are not given are those of the load."""
    sizes = LOADS[args.load] if args.load else Sizes()
    for name, value in vars(sizes).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _throughput(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import throughput
    from diffkv.lab.bench.models import PAPER_MODELS

    options = _options(args)
    _set_sizes(args)
    if args.profile and args.together:
        raise ConfigError("--profile looks at one engine at a time: leave out --together")
    if args.smoke:
        vars(args).update(num_prompts=6, input_len=260, output_len=8, repeats=1)
        if args.model is None:
            args.random_weights = "bench-tiny"
    writer = _writer(args, prompts.device())
    if args.paper and args.kv_bytes is None:
        raise ConfigError("--paper needs --kv-bytes: what a GPU has left beside the weights")
    for model in PAPER_MODELS if args.paper else [args.model]:
        args.model = model
        with tempfile.TemporaryDirectory(prefix="diffkv-bench-") as folder:
            name, engine, config = _model(args, Path(folder))
            workload = _workload(args, name, config)
            engine |= {"model": name, **_engine_flags(args)}
            facts = {"model": args.model or args.random_weights or "bench-small",
                     "weights": engine.get("load_format", "own")}  # fmt: skip
            throughput.run(
                engine, workload, _kv_bytes(args, config, workload.longest),
                _compared(args, options, writer), args.repeats, writer, facts, args.profile,
                args.together,
            )  # fmt: skip


def _map(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import pages, prompt, sweep
    from diffkv.lab.bench.throughput import four_requests

    options = _options(args)
    if args.smoke:
        vars(args).update(ctx=[64, 260], requests=[1, 6], output_len=8, repeats=1)
        if args.model is None:
            args.random_weights = "bench-tiny"
    writer = _writer(args, prompts.device())
    with tempfile.TemporaryDirectory(prefix="diffkv-bench-") as folder:
        name, engine, config = _model(args, Path(folder))
        if not config:
            raise ConfigError("a model id is not enough to map: give its folder")
        four = four_requests(config, max(args.ctx) + args.output_len)
        budgets = args.kv_bytes or ([four] if args.smoke else [four // 2, 4 * four])
        engine |= {"model": name, **_engine_flags(args)}
        facts = {"model": args.model or args.random_weights or "bench-small",
                 "weights": engine.get("load_format", "own")}  # fmt: skip
        wanted = sweep.Sweep(
            args.ctx, args.requests, budgets, args.output_len, args.repeats, args.apart
        )
        compared = _compared(args, options, writer)
        mapped = sweep.run(engine, config, wanted, compared, writer, facts)
    prompt.add_shares(writer, mapped, config, args.quant)
    if args.plot:
        pages.draw_map(mapped, args.plot)


def _compared(
    args: argparse.Namespace, options: list[dict[str, Any]], writer: "Writer"
) -> "list[Setting]":
    """The settings to compare; a smoke run leaves fp8 out, for its time."""
    from diffkv.lab.bench.throughput import STOCK, settings

    stock = getattr(args, "stock", None)
    compared = settings(options, STOCK if stock is None else stock)
    if not args.smoke:
        return compared
    writer.note("smoke: stock fp8 is left out")
    return [setting for setting in compared if setting.name != "stock fp8"]


def _workload(args: argparse.Namespace, model: str, config: dict[str, Any]) -> Any:
    from diffkv.lab.bench import throughput

    if args.workload == RANDOM:
        words = config.get("vocab_size", 512)
        return throughput.random_workload(
            args.num_prompts, args.input_len, args.output_len, args.range_ratio, words
        )
    shipped = files("diffkv") / "data" / "prompts.jsonl"
    path = Path(str(shipped)) if args.workload == SHIPPED else Path(args.workload)
    return throughput.text_workload(path, model, args.num_prompts, args.output_len)


def _engine_flags(args: argparse.Namespace) -> dict[str, Any]:
    if not args.flags:
        return {}
    from diffkv.vllm_plugin.front.offline import engine_flags

    return engine_flags(args.flags)


def _serving(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import pages, serving
    from diffkv.lab.bench.throughput import Setting, settings

    _set_sizes(args)
    # Requests that may lose tokens need sums of all of them
    compared = settings(_options(args, drops=True if args.request_alpha_low else None))
    if args.smoke:
        vars(args).update(num_prompts=4, input_len=64, output_len=8, rates=[4.0])
        compared = [compared[-1]]
        if args.model is None:
            args.random_weights = "bench-tiny"
    if args.url:
        compared = [Setting("url", None, None, {})]
    alphas = (("high", args.request_alpha_high), ("low", args.request_alpha_low))
    given = {f"diffkv_alpha_{name}": value for name, value in alphas if value is not None}
    traffic = serving.Traffic(
        args.rates, args.num_prompts, args.input_len, args.output_len, args.goodput,
        {"vllm_xargs": given} if given else None,
    )  # fmt: skip
    writer = _writer(args, prompts.device())
    with tempfile.TemporaryDirectory(prefix="diffkv-bench-") as folder:
        model, engine, config = _model(args, Path(folder))
        longest = args.input_len + args.output_len
        flags = [
            "--kv-cache-memory-bytes", str(_kv_bytes(args, config, longest)), "--enforce-eager",
            "--max-model-len", str(longest + 16), "--max-num-seqs", str(max(8, args.num_prompts)),
        ]  # fmt: skip
        for name, value in engine.items():
            flags += [f"--{name.replace('_', '-')}", value]
        facts = {"model": args.model or args.random_weights or "bench-small"}
        serving.run(model, traffic, compared, [*flags, *args.flags], writer, facts, args.url)
    if args.plot:
        pages.draw_serving(writer.rows, args.plot)
