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
from diffkv.cli.arguments import Listed, above_zero, num_bytes, num_tokens, positive
from diffkv.cli.engine_options import model_folder
from diffkv.cli.models import check_hub
from diffkv.lab.bench.loads import LOADS, Sizes
from diffkv.quant import DEFAULT_QUANT, ConfigError, QuantConfig

if TYPE_CHECKING:
    from diffkv.lab.bench.throughput import Setting
    from diffkv.lab.rows import Writer

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""`throughput`, `map` and `serving` pass to vLLM what is not listed here; the others refuse it."""

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
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="a folder, a model id, or 'reference'")
    source.add_argument("--random-weights", metavar="NAME", help="sizes of a known model")
    parser.add_argument("--quant", nargs="+", action=Listed, default=[DEFAULT_QUANT])
    parser.add_argument("--alpha-high", type=float)
    parser.add_argument("--alpha-low", type=float)
    parser.add_argument("--window", type=positive, help="most recent tokens that stay high")
    parser.epilog = "Any other option is passed on to vLLM's engine, in all settings."


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument(
        "--kv-bytes", type=num_bytes, help="KV budget (default: four requests in bf16)"
    )
    usual = Sizes()
    parser.add_argument(
        "--load",
        choices=LOADS,
        help="sizes of requests that people have; those given apart override it",
    )
    parser.add_argument("--input-len", type=num_tokens, help=f"default: {usual.input_len}")
    parser.add_argument("--output-len", type=num_tokens, help=f"default: {usual.output_len}")
    parser.add_argument("--num-prompts", type=positive, help=f"default: {usual.num_prompts}")


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    _add_engine_options(parser)
    parser.add_argument("--workload", default=RANDOM,
                        help="random, shipped, or a file of JSON lines with prompts")  # fmt: skip
    parser.add_argument("--range-ratio", type=float, default=0.0, help="spread of random lengths")
    parser.add_argument("--repeats", type=positive, default=1)
    parser.add_argument("--stock", nargs="*", action=Listed, metavar="DTYPE",
                        help="vLLM's own caches, or none (default: bf16 fp8)")  # fmt: skip
    parser.add_argument("--together", action="store_true",
                        help="all engines there at once, started at once on a GPU")  # fmt: skip
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
