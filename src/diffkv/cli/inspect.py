"""`diffkv inspect`: what every layer and head kept of some prompts."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkv.cli import generate
from diffkv.cli.engine_options import REFERENCE, add_cache_options, cache_options, model_folder
from diffkv.cli.models import load_config
from diffkv.cli.option_types import Listed, num_bytes
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.vllm_plugin.front.insight import Insight
    from diffkv.vllm_plugin.options import Options

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""Options that are not listed here are those of vLLM's engine."""

PNG, HTML, JSON = "heatmap.png", "tokens.html", "inspect.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model", default=REFERENCE, help="a folder or a model id (default: the shipped model)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", action=Listed, metavar="TEXT", help="prompts")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help='a file of prompts: one a line, or JSON lines with "prompt" (default: shipped ones)',
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, default=1, metavar="N",
        help="new tokens of each prompt; 1 shows what the prompt left (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"write {PNG}, {HTML} and {JSON} to a folder"
    )
    parser.add_argument("--layer", type=int, default=0, help=f"of {HTML} (default: 0)")
    parser.add_argument("--head", type=int, default=0, help=f"KV head of {HTML} (default: 0)")
    parser.add_argument(
        "--kv-memory", type=num_bytes, metavar="SIZE",
        help="KV budget, tables included (default: as for diffkv generate)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--verbose", action="store_true", help="show the engine's log")
    add_cache_options(parser)
    parser.epilog = (
        f"{HTML} shows the first prompt. "
        "Any other option is passed on to vLLM's engine: --dtype, --max-model-len, …"
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse before an engine starts what would fail after it."""
    for name in ("max_tokens", "kv_memory"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    model = load_config(model_folder(args.model))
    for name, num in (("layer", model.num_layers), ("head", model.num_kv_heads)):
        if not 0 <= getattr(args, name) < num:
            raise ConfigError(f"--{name} must be in 0 .. {num - 1}, got {getattr(args, name)}")
    if args.out is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--out draws with matplotlib: pip install 'diffkv[plot]'")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to --out {args.out}: {error.strerror}") from None


def run(args: argparse.Namespace) -> int:
    """Run the prompts, look, and print."""
    if not args.verbose:
        generate.silence_engine()
    options = cache_options(args)
    prompts = [question.prompt for question in generate._questions(args)]
    _check(args)
    from diffkv.vllm_plugin.front.insight import inspect

    insights = inspect(prompts, generate._engine(args), options, args.max_tokens)
    facts = summarize(args.model, options, insights)
    if args.json:
        print(json.dumps(facts))
    else:
        from diffkv.cli.heatmap import print_maps

        print_maps(facts)
    if args.out is not None:
        _write(args, facts, insights[0])
    return 0


def summarize(model: str, options: "Options", insights: "list[Insight]") -> dict[str, Any]:
    """Shares of each layer and head over all prompts, and the counts of each prompt."""
    thresholds = options.thresholds()
    num_tokens = sum(insight.num_tokens for insight in insights)
    num_layers, num_heads = len(insights[0].high), len(insights[0].high[0])
    shares = {
        tier: [
            [
                sum(getattr(insight, tier)[layer][head] for insight in insights) / num_tokens
                for head in range(num_heads)
            ]
            for layer in range(num_layers)
        ]
        for tier in ("high", "low")
    }
    shares["dropped"] = [
        [1 - high - low for high, low in zip(highs, lows, strict=True)]
        for highs, lows in zip(shares["high"], shares["low"], strict=True)
    ]
    return {
        "model": model,
        "quant": options.quant,
        "alpha_high": thresholds.alpha_high,
        "alpha_low": thresholds.alpha_low,
        "window": options.window,
        "num_layers": num_layers,
        "num_kv_heads": num_heads,
        "num_tokens": num_tokens,
        "mean": {
            tier: sum(map(sum, rows)) / (num_layers * num_heads) for tier, rows in shares.items()
        },
        "shares": shares,
        "prompts": [
            {"num_tokens": insight.num_tokens, "high": insight.high, "low": insight.low}
            for insight in insights
        ],
    }


def _write(args: argparse.Namespace, facts: dict[str, Any], first: "Insight") -> None:
    from diffkv.cli.heatmap import draw_png, tokens_html

    tiers = first.tiers[args.layer][args.head]
    tokens = {"layer": args.layer, "head": args.head, "texts": first.texts, "tiers": tiers}
    draw_png(facts, args.out / PNG)
    (args.out / HTML).write_text(
        tokens_html(facts, args.layer, args.head, first.texts, tiers), encoding="utf-8"
    )
    (args.out / JSON).write_text(json.dumps({**facts, "tokens": tokens}), encoding="utf-8")
    if not args.json:
        print(f"{PNG}, {HTML} and {JSON} are in {args.out}")
