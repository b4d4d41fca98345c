"""`diffkv plan`: what fits a GPU's memory in each cache format, and whether compression will pay."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from diffkv.capacity import (
    HIGH_SHARE,
    Mix,
    plan_dense,
    plan_format,
    rank_of,
    verdict,
)
from diffkv.cli.arguments import Listed, num_bytes, num_tokens, positive
from diffkv.cli.models import load_config, weights_of
from diffkv.quant import DEFAULT_QUANT, ConfigError, QuantConfig

__all__ = ["add_arguments", "run"]

DEFAULT_FORMATS = ("k8v8", "k8v4", "k4v4", "k4v2", DEFAULT_QUANT, "k8v4-k4v2", "k8v4g1x2-k4v2g2x4")
DEFAULT_UTILIZATION = 0.92
DEFAULT_RESERVE = "2GiB"
DEFAULT_CONTEXT = "8K"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", required=True, help="a folder, a config.json or a model id")
    parser.add_argument(
        "--gpu-memory",
        type=num_bytes,
        required=True,
        metavar="SIZE",
        help="of one GPU: 141GiB, 80GB …",
    )
    parser.add_argument(
        "--context", type=num_tokens, default=DEFAULT_CONTEXT, metavar="TOKENS",
        help="tokens of a request when it ends: 32768, 32K … (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=DEFAULT_UTILIZATION, metavar="SHARE",
        help="as vLLM's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--reserve", type=num_bytes, default=DEFAULT_RESERVE, metavar="SIZE",
        help="activations and CUDA graphs of one GPU; an assumption (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs (default: 1)"
    )
    parser.add_argument(
        "--quant", nargs="+", action=Listed, metavar="FORMAT", default=list(DEFAULT_FORMATS),
        help=f"formats to plan (default: {' '.join(DEFAULT_FORMATS)}); the verdict is on the first "
        f"pair, {DEFAULT_QUANT} by default",
    )  # fmt: skip
    parser.add_argument(
        "--high-share", type=float, default=HIGH_SHARE, metavar="SHARE",
        help="of tokens outside the window that pairs keep high; an assumption: measure yours with "
        "diffkv inspect (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dropped-share", type=float, default=0.0, metavar="SHARE",
        help="of tokens outside the window that pairs drop (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--drops", action="store_true",
        help="with sums and positions of every token, as alpha_low above 0 needs them",
    )  # fmt: skip
    parser.add_argument(
        "--requests",
        type=positive,
        metavar="N",
        help="requests at once that there are (default: no end)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    from diffkv.cli.engine_options import model_folder

    if not 0 < args.gpu_memory_utilization <= 1:
        raise ConfigError(
            f"--gpu-memory-utilization must be in 0 .. 1, got {args.gpu_memory_utilization}"
        )
    context, memory, reserve = args.context, args.gpu_memory, args.reserve
    quants = [QuantConfig.parse(text) for text in args.quant]
    mix = Mix(args.high_share, args.dropped_share)
    folder = model_folder(args.model)
    model = load_config(folder)
    weights = weights_of(folder, model)
    usable = int(memory * args.gpu_memory_utilization) - reserve
    if usable <= 0:
        raise ConfigError(
            f"--gpu-memory {_size(memory)} is used up by the {_size(reserve)} of --reserve: more of it, "
            f"with a unit as in 24GiB, or a smaller --reserve"
        )
    rank = rank_of(model, weights.num_bytes, args.tensor_parallel_size, usable)

    dense = [plan_dense(name, rank, context) for name in ("bf16", "fp8")]
    ours = [plan_format(quant, rank, context, mix, args.drops) for quant in quants]
    judged = next((i for i, quant in enumerate(quants) if quant.has_low), 0)
    judgement = verdict(rank, dense[0], ours[judged], context, args.requests)
    facts = {
        "model": args.model,
        "architecture": model.architecture,
        "num_layers": model.num_layers,
        "num_windows": model.num_windows,
        "window": model.window,
        "num_states": model.states.num_layers,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "context": context,
        "max_model_len": model.max_model_len,
        "tensor_parallel_size": args.tensor_parallel_size,
        "gpu_memory_bytes": memory,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "reserve_bytes": reserve,
        "weight_bytes": weights.num_bytes,
        "weight_source": weights.source,
        "weight_bytes_per_gpu": rank.weight_bytes,
        "kv_bytes_per_gpu": rank.kv_bytes,
        "high_share": args.high_share,
        "dropped_share": args.dropped_share,
        "drops": args.drops,
        "formats": [asdict(plan) for plan in (*dense, *ours)],
        "verdict": asdict(judgement),
    }
    if args.json:
        print(json.dumps(facts))
    else:
        _print(facts)
    return 0


def _size(num_bytes: float) -> str:
    unit, name = (1 << 30, "GiB") if num_bytes >= 1 << 30 else (1 << 20, "MiB")
    return f"{num_bytes / unit:.2f} {name}"


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{facts['model']}: {facts['architecture']}, {facts['num_layers']} layers, "
        f"{facts['num_kv_heads']} KV heads of {facts['head_dim']}\n"
        f"weights {_size(facts['weight_bytes'])} ({facts['weight_source']}), on each of "
        f"{facts['tensor_parallel_size']} GPU {_size(facts['weight_bytes_per_gpu'])}; "
        f"KV budget of a GPU {_size(facts['kv_bytes_per_gpu'])}; requests of {facts['context']:,} "
        f"tokens"
    )
    name = facts["verdict"]["name"]
    ours = next(plan for plan in facts["formats"] if plan["name"] == name)
    for num, what, taken in (
        (
            facts["num_windows"],
            f"layers with a window or chunk of {facts['window']:,} tokens",
            ours["window_bytes"],
        ),
        (facts["num_states"], "layers with a recurrent state", ours["state_bytes"]),
    ):
        if num:
            console.print(
                f"{num} {what} keep vLLM's own cache: of the KV budget {_size(taken)} for the "
                f"{ours['num_requests']} requests of {ours['name']}"
            )
    table = Table("cache", "KB a token", "of bf16", "requests", "of bf16", "tables")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    bf16 = facts["formats"][0]
    for plan in facts["formats"]:
        times = plan["num_requests"] / bf16["num_requests"] if bf16["num_requests"] else None
        table.add_row(
            plan["name"],
            f"{plan['bytes_per_token'] / 1000:.2f}",
            f"{plan['bytes_per_token'] / bf16['bytes_per_token']:.1%}",
            f"{plan['num_requests']}" if plan["starts"] else "does not start",
            "-" if times is None else f"{times:.2f}x",
            _size(plan["table_bytes"]) if plan["page_bytes"] else "",
        )
    console.print(table)
    console.print(
        f"Per GPU. Assumed for pairs: {facts['high_share']:.0%} of the tokens outside the window "
        f"high, {facts['dropped_share']:.0%} dropped; {_size(facts['reserve_bytes'])} for activations "
        f"and CUDA graphs."
    )
    if facts["max_model_len"] and facts["context"] > facts["max_model_len"]:
        console.print(f"The model's own context is only {facts['max_model_len']:,} tokens.")
    console.print(f"Will compression pay? {facts['verdict']['text']}")
