"""`diffkv bench`: measure kernels, the pool's own work, engines and servers."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkv.cli import bench_agent, prompts
from diffkv.cli.arguments import flag_of
from diffkv.cli.bench_engines import (
    BENCH_SMALL,
    engine_flags,
    find_model,
    make_writer,
    model_facts,
    options_by_quant,
    room_for,
)
from diffkv.cli.bench_options import KIB, RANDOM, add_arguments
from diffkv.lab.bench.loads import LOADS, Sizes
from diffkv.quant import ConfigError, QuantConfig

if TYPE_CHECKING:
    from diffkv.lab.bench.throughput import Setting, Workload
    from diffkv.lab.rows import Writer

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""`attention` and `manager` refuse what is not listed here; the others pass it on to vLLM."""

FULL_GRID = {"ctx": [KIB, 4 * KIB, 16 * KIB, 64 * KIB], "batch": [1, 8, 32, 128], "group": [4, 8]}
SMOKE_REPEATS = 3
SHIPPED = "shipped"


def run(args: argparse.Namespace) -> int:
    """Measure."""
    commands: dict[str, Callable[[argparse.Namespace], int | None]] = {
        "attention": _attention,
        "manager": _manager,
        "throughput": _throughput,
        "map": _map,
        "agent": bench_agent.run,
        "serving": _serving,
    }
    if args.flags and args.bench in ("attention", "manager"):
        raise ConfigError(f"diffkv bench {args.bench} has no option {args.flags[0]}: see --help")
    quants = getattr(args, "quant", [])
    for quant in quants if isinstance(quants, list) else [quants]:
        QuantConfig.parse(quant)
    return commands[args.bench](args) or 0


def _prepare_device(args: argparse.Namespace) -> None:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here: leave out --device cuda")
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)


def _attention(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import attention

    if args.cpu_time and (args.device, args.threads) != ("cpu", 1):
        raise ConfigError("--cpu-time is the time of one thread of a CPU: add --threads 1")
    if args.segment < 0:
        raise ConfigError(f"--segment must be at least 0, got {args.segment}")
    _prepare_device(args)
    if args.full:
        vars(args).update(FULL_GRID, ragged="both", tiers=["high", "low", "mix"])
    if args.smoke:
        vars(args).update(ctx=[KIB], batch=[1, 2], repeats=SMOKE_REPEATS, ragged="both")
    ragged = {"no": [False], "yes": [True], "both": [False, True]}[args.ragged]
    grid = attention.Grid(
        args.quant, args.tiers, args.ctx, args.batch, args.group, ragged, args.kv_heads,
        args.head_dim, args.repeats, args.warm, args.segment,
    )  # fmt: skip
    clock = time.thread_time if args.cpu_time else time.perf_counter
    attention.run(grid, args.device, make_writer(args, args.device), clock)


def _manager(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import pool

    _prepare_device(args)
    if args.smoke:
        vars(args).update(layers=4, requests=2, steps=3)
    contents = pool.Contents(
        args.quant, args.layers, args.kv_heads, args.requests, head_dim=args.head_dim
    )
    writer = make_writer(args, args.device)
    pool.run(contents, args.device, writer, args.steps, args.full, small=args.smoke)


def _kv_bytes(args: argparse.Namespace, config: dict[str, Any], longest: int) -> int:
    return int(args.kv_bytes) if args.kv_bytes else room_for(4, config, longest)


def _sizes(args: argparse.Namespace, load: str | None) -> Sizes:
    """Sizes that are not given are those of the load."""
    usual = LOADS[load] if load else Sizes()
    given = {name: getattr(args, name) for name in vars(usual)}
    return replace(usual, **{name: value for name, value in given.items() if value is not None})


def _throughput(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import throughput
    from diffkv.lab.bench.models import PAPER_MODELS

    options = options_by_quant(args, args.quant)
    if args.profile and args.together:
        raise ConfigError("--profile looks at one engine at a time: leave out --together")
    if args.smoke:
        vars(args).update(num_prompts=6, input_len=260, output_len=8, repeats=1)
        if args.model is None:
            args.random_weights = "bench-tiny"
    writer = make_writer(args, prompts.device())
    if args.paper and args.kv_bytes is None:
        raise ConfigError("--paper needs --kv-bytes: what a GPU has left beside the weights")
    for model in PAPER_MODELS if args.paper else [args.model]:
        args.model = model
        with tempfile.TemporaryDirectory(prefix="diffkv-bench-") as folder:
            name, engine, config = find_model(args, Path(folder))
            workloads = [_workload(args, load, name, config) for load in args.load or [None]]
            engine |= {"model": name, **engine_flags(args)}
            throughput.run(
                engine,
                workloads,
                _kv_bytes(args, config, max(each.longest for each in workloads)),
                _compared(args, options, writer),
                args.repeats,
                writer,
                model_facts(args, engine),
                args.profile,
                args.together,
            )


def _map(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import pages, prompt, sweep

    options = options_by_quant(args, args.quant)
    if args.smoke:
        vars(args).update(ctx=[64, 260], requests=[1, 6], output_len=8, repeats=1)
        if args.model is None:
            args.random_weights = "bench-tiny"
    writer = make_writer(args, prompts.device())
    with tempfile.TemporaryDirectory(prefix="diffkv-bench-") as folder:
        name, engine, config = find_model(args, Path(folder))
        if not config:
            raise ConfigError("a model id is not enough to map: give its folder")
        four = room_for(4, config, max(args.ctx) + args.output_len)
        budgets = args.kv_bytes or ([four] if args.smoke else [four // 2, 4 * four])
        engine |= {"model": name, **engine_flags(args)}
        wanted = sweep.Sweep(
            args.ctx, args.requests, budgets, args.output_len, args.repeats, args.apart
        )
        compared = _compared(args, options, writer)
        mapped = sweep.run(engine, config, wanted, compared, writer, model_facts(args, engine))
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


def _workload(
    args: argparse.Namespace, load: str | None, model: str, config: dict[str, Any]
) -> "Workload":
    from diffkv.lab.bench import throughput

    sizes = _sizes(args, load)
    if args.workload == RANDOM:
        words = config.get("vocab_size", 512)
        return throughput.random_workload(
            sizes.num_prompts, sizes.input_len, sizes.output_len, args.range_ratio, words
        )
    shipped = files("diffkv") / "data" / "prompts.jsonl"
    path = Path(str(shipped)) if args.workload == SHIPPED else Path(args.workload)
    return throughput.text_workload(path, model, sizes.num_prompts, sizes.output_len)


def _serving(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import pages, serving
    from diffkv.lab.bench.throughput import Setting, settings

    sizes = _sizes(args, args.load)
    # Requests that may lose tokens need sums of all of them
    drops = True if args.request_alpha_low else None
    compared = settings(options_by_quant(args, args.quant, drops=drops))
    if args.smoke:
        args.rates, sizes = [4.0], Sizes(num_prompts=4, input_len=64, output_len=8)
        compared = [compared[-1]]
        if args.model is None:
            args.random_weights = "bench-tiny"
    if args.url:
        compared = [Setting("url", None, None, {})]
    alphas = (("high", args.request_alpha_high), ("low", args.request_alpha_low))
    given = {f"diffkv_alpha_{name}": value for name, value in alphas if value is not None}
    traffic = serving.Traffic(
        args.rates, sizes.num_prompts, sizes.input_len, sizes.output_len, args.goodput,
        {"vllm_xargs": given} if given else None,
    )  # fmt: skip
    writer = make_writer(args, prompts.device())
    with tempfile.TemporaryDirectory(prefix="diffkv-bench-") as folder:
        model, engine, config = find_model(args, Path(folder))
        longest = sizes.input_len + sizes.output_len
        flags = [
            "--kv-cache-memory-bytes", str(_kv_bytes(args, config, longest)), "--enforce-eager",
            "--max-model-len", str(longest + 16), "--max-num-seqs", str(max(8, sizes.num_prompts)),
        ]  # fmt: skip
        for name, value in engine.items():
            flags += [flag_of(name), value]
        facts = {"model": args.model or args.random_weights or BENCH_SMALL}
        serving.run(model, traffic, compared, [*flags, *args.flags], writer, facts, args.url)
    if args.plot:
        pages.draw_serving(writer.rows, args.plot)
