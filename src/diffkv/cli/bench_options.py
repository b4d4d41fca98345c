"""Options of `diffkv bench`."""

import argparse
from pathlib import Path
from typing import Any

from diffkv.cli import bench_agent
from diffkv.cli.arguments import Listed, above_zero, num_bytes, num_tokens, positive
from diffkv.cli.bench_engines import add_model, add_thresholds
from diffkv.lab.bench.loads import LOADS, Sizes
from diffkv.quant import DEFAULT_QUANT
from diffkv.segments import SEGMENT

__all__ = ["KIB", "RANDOM", "add_arguments"]

KIB = 1024
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
    parser.add_argument("--segment", type=int, default=SEGMENT,
                        help="tokens of a closed row, as of diffkv serve; 0: requests are one row "
                             "(default: %(default)s)")  # fmt: skip
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


def _add_engine_options(parser: argparse.ArgumentParser, loads: dict[str, Any]) -> None:
    _add_source(parser)
    parser.add_argument(
        "--kv-bytes", type=num_bytes, help="KV budget (default: four requests in bf16)"
    )
    usual = Sizes()
    parser.add_argument(
        "--load",
        choices=LOADS,
        **loads,
        help="sizes of requests that people have; those given apart override it",
    )
    parser.add_argument("--input-len", type=num_tokens, help=f"default: {usual.input_len}")
    parser.add_argument("--output-len", type=num_tokens, help=f"default: {usual.output_len}")
    parser.add_argument("--num-prompts", type=positive, help=f"default: {usual.num_prompts}")


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    _add_engine_options(parser, {"nargs": "+", "action": Listed, "default": []})
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
    _add_engine_options(parser, {})
    parser.add_argument("--url", help="of a running server, instead of starting some")
    parser.add_argument("--rates", nargs="+", action=Listed, type=above_zero, default=[0.5, 1.0, 2.0],
                        help="requests a second")  # fmt: skip
    parser.add_argument("--goodput", nargs="+", action=Listed, default=[], metavar="METRIC:MS",
                        help="what a good answer keeps to, such as ttft:5000 tpot:200")  # fmt: skip
    parser.add_argument("--request-alpha-high", type=float, help="sent with every request")
    parser.add_argument("--request-alpha-low", type=float, help="likewise")
    parser.add_argument("--plot", type=Path, help="a PNG of latency against rate")
