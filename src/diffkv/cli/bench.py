"""`diffkv bench`: measure kernels, the pool's own work, engines and servers."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkv.cli import bench_agent, prompts
from diffkv.cli.arguments import Listed, above_zero, num_bytes, num_tokens, positive
from diffkv.cli.bench_engines import (
    BENCH_SMALL,
    add_model,
    add_thresholds,
    engine_flags,
    find_model,
    make_writer,
    model_facts,
    options_by_quant,
)
from diffkv.quant import DEFAULT_QUANT, ConfigError, QuantConfig

if TYPE_CHECKING:
    from diffkv.lab.bench.throughput import Setting
    from diffkv.lab.rows import Writer

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""`attention` and `manager` refuse what is not listed here; the others pass it on to vLLM."""

KIB = 1024
FULL_GRID = {"ctx": [KIB, 4 * KIB, 16 * KIB, 64 * KIB], "batch": [1, 8, 32, 128], "group": [4, 8]}
SMOKE_REPEATS = 3
SHIPPED = "shipped"
RANDOM = "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    commands = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, text, add in (
        ("attention", "decode attention, beside vLLM's own kernels", _add_attention),
        ("manager", "the pool's own work, and how it grows", _add_manager),
        ("throughput", "offline tokens a second, at one KV budget", _add_throughput),
        ("map", "throughput by context, requests and KV budget: where the gain is", _add_map),
        (
            "agent",
            "conversations that grow by turns, with prefix caching",
            bench_agent.add_arguments,
        ),
        ("serving", "latency and goodput of a server, by request rate", _add_serving),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--smoke", action="store_true", help="a minute's worth, to see it run")
        command.add_argument("--json", action="store_true", help="JSON lines on standard output")
        command.add_argument("--out", type=Path, help="a file for the JSON lines")
        add(command)


def _add_attention(parser: argparse.ArgumentParser) -> None:
    from diffkv.lab.bench.fill import TIER_MIXES

    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--quant",
        nargs="+",
        action=Listed,
        default=["k8v4", DEFAULT_QUANT, "k16v16"],
        help="formats",
    )
    parser.add_argument("--tiers", nargs="+", action=Listed, choices=TIER_MIXES, default=["low", "mix"],
                        help="all tokens high, all low, or 20 %% high (default: low mix)")  # fmt: skip
    parser.add_argument(
        "--ctx", nargs="+", action=Listed, type=num_tokens, default=[KIB, 4 * KIB, 16 * KIB]
    )
    parser.add_argument("--batch", nargs="+", action=Listed, type=positive, default=[1, 8])
    parser.add_argument(
        "--group",
        nargs="+",
        action=Listed,
        type=positive,
        default=[4],
        help="query heads a KV head",
    )
    parser.add_argument("--kv-heads", type=positive, default=8)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--ragged", choices=["no", "yes", "both"], nargs="?", const="yes",
                        default="no", help="lengths and tiers that differ")  # fmt: skip
    parser.add_argument("--threads", type=positive, help="of the CPU (default: torch's)")
    parser.add_argument("--cpu-time", action="store_true",
                        help="time of the one thread, on a machine that is shared")  # fmt: skip
    parser.add_argument("--warm", action="store_true",
                        help="no flush of the caches between calls: what arithmetic takes")  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=20)
    parser.add_argument("--full", choices=["grid"], help="contexts, batches and groups of the grid")


def _add_manager(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quant", default=DEFAULT_QUANT)
    parser.add_argument("--layers", type=positive, default=32)
    parser.add_argument("--kv-heads", type=positive, default=8)
    parser.add_argument("--requests", type=positive, default=8)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--steps", type=positive, default=20, help="decode steps that are timed")
    parser.add_argument("--threads", type=positive, help="of the CPU (default: torch's)")
    parser.add_argument(
        "--full", action="store_true", help="to 64K tokens, 256 requests, 2560 heads"
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--quant", nargs="+", action=Listed, default=[DEFAULT_QUANT])
    add_thresholds(parser)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument(
        "--kv-bytes", type=num_bytes, help="KV budget (default: four requests in bf16)"
    )
    parser.add_argument("--input-len", type=num_tokens, default=1024)
    parser.add_argument("--output-len", type=num_tokens, default=128)
    parser.add_argument("--num-prompts", type=positive, default=16)


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    _add_engine_options(parser)
    parser.add_argument("--workload", default=RANDOM,
                        help="random, shipped, or a file of JSON lines with prompts")  # fmt: skip
    parser.add_argument("--range-ratio", type=float, default=0.0, help="spread of random lengths")
    parser.add_argument("--repeats", type=positive, default=1)
    parser.add_argument("--profile", action="store_true", help="where each engine spends its time")
    parser.add_argument("--paper", action="store_true", help="the original's models, with weights")


def _add_map(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--ctx", nargs="+", action=Listed, type=num_tokens, default=[256, KIB, 4 * KIB],
                        help="tokens of a prompt (default: 256 1K 4K)")  # fmt: skip
    parser.add_argument("--requests", nargs="+", action=Listed, type=positive, default=[1, 4, 12],
                        help="all there at the start (default: 1 4 12)")  # fmt: skip
    parser.add_argument("--kv-bytes", nargs="+", action=Listed, type=num_bytes,
                        help="KV budgets (default: 2 and 16 of the longest in bf16)")  # fmt: skip
    parser.add_argument("--output-len", type=num_tokens, default=64)
    parser.add_argument("--repeats", type=positive, default=1)
    parser.add_argument("--apart", action="store_true",
                        help="one engine at a time, where memory does not hold all")  # fmt: skip
    parser.add_argument("--plot", type=Path, help="a PNG of the map")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    _add_engine_options(parser)
    parser.add_argument("--url", help="of a running server, instead of starting some")
    parser.add_argument("--rates", nargs="+", action=Listed, type=above_zero, default=[0.5, 1.0, 2.0],
                        help="requests a second")  # fmt: skip
    parser.add_argument("--goodput", nargs="+", action=Listed, default=[], metavar="METRIC:MS",
                        help="what a good answer keeps to, such as ttft:5000 tpot:200")  # fmt: skip
    parser.add_argument("--request-alpha-high", type=float, help="sent with every request")
    parser.add_argument("--request-alpha-low", type=float, help="likewise")
    parser.add_argument("--plot", type=Path, help="a PNG of latency against rate")


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
    from diffkv.lab.bench.throughput import room_for

    if args.kv_bytes:
        return int(args.kv_bytes)
    if not config:
        raise ConfigError("a model id needs --kv-bytes: the sizes of its cache are not known here")
    return room_for(4, config, longest)


def _throughput(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import throughput
    from diffkv.lab.bench.models import PAPER_MODELS

    options = options_by_quant(args, args.quant)
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
            workload = _workload(args, name, config)
            engine |= {"model": name, **engine_flags(args)}
            throughput.run(
                engine,
                workload,
                _kv_bytes(args, config, workload.longest),
                _compared(args, options, writer),
                args.repeats,
                writer,
                model_facts(args, engine),
                args.profile,
            )


def _map(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import pages, prompt, sweep
    from diffkv.lab.bench.throughput import room_for

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
    from diffkv.lab.bench.throughput import settings

    compared = settings(options)
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


def _serving(args: argparse.Namespace) -> None:
    from diffkv.lab.bench import pages, serving
    from diffkv.lab.bench.throughput import Setting, settings

    # Requests that may lose tokens need sums of all of them
    drops = True if args.request_alpha_low else None
    compared = settings(options_by_quant(args, args.quant, drops=drops))
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
    writer = make_writer(args, prompts.device())
    with tempfile.TemporaryDirectory(prefix="diffkv-bench-") as folder:
        model, engine, config = find_model(args, Path(folder))
        longest = args.input_len + args.output_len
        flags = [
            "--kv-cache-memory-bytes", str(_kv_bytes(args, config, longest)), "--enforce-eager",
            "--max-model-len", str(longest + 16), "--max-num-seqs", str(max(8, args.num_prompts)),
        ]  # fmt: skip
        for name, value in engine.items():
            flags += [f"--{name.replace('_', '-')}", value]
        facts = {"model": args.model or args.random_weights or BENCH_SMALL}
        serving.run(model, traffic, compared, [*flags, *args.flags], writer, facts, args.url)
    if args.plot:
        pages.draw_serving(writer.rows, args.plot)
