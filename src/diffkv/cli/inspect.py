"""`diffkv inspect`: what every layer and head kept of some prompts."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffkv.cli import prompts
from diffkv.cli.arguments import positive
from diffkv.cli.engine_options import add_cache_options, cache_options, model_folder
from diffkv.cli.models import load_config
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.rows import Row
    from diffkv.vllm_plugin.front.insight import Insight

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""Options that are not listed here are those of vLLM's engine."""

PNG, HTML, JSON = "heatmap.png", "tokens.html", "inspect.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    prompts.add_engine_options(parser)
    prompts.add_prompt_options(parser)
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=1,
        metavar="N",
        help="new tokens of each prompt; 1 shows what the prompt left (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"write {PNG}, {HTML} and {JSON} to a folder"
    )
    parser.add_argument("--layer", type=int, default=0, help=f"of {HTML} (default: 0)")
    parser.add_argument("--head", type=int, default=0, help=f"KV head of {HTML} (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_cache_options(parser)
    parser.epilog = (
        f"{HTML} shows the first prompt. "
        "Any other option is passed on to vLLM's engine: --dtype, --max-model-len, …"
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse before an engine starts what would fail after it."""
    model = load_config(model_folder(args.model))
    num_layers = model.num_full or model.num_layers  # windows that are disabled are full, too
    for name, num in (("layer", num_layers), ("head", model.num_kv_heads)):
        if not 0 <= getattr(args, name) < num:
            raise ConfigError(f"--{name} must be in 0 .. {num - 1}, got {getattr(args, name)}")
    if args.out is None:
        return
    from diffkv.lab import plots

    plots.require()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to --out {args.out}: {error.strerror}") from None


def run(args: argparse.Namespace) -> int:
    """Run the prompts, look, and print."""
    if not args.verbose:
        prompts.silence_engine()
    options = cache_options(args)
    texts = [question.prompt for question in prompts.questions(args)]
    _check(args)
    from diffkv.lab.evaluation.results import HEADS
    from diffkv.lab.provenance import collect
    from diffkv.lab.rows import Row
    from diffkv.vllm_plugin.front.insight import inspect, summarize

    insights = inspect(texts, prompts.engine_arguments(args), options, args.max_tokens)
    thresholds = options.thresholds()
    case = {
        "model": args.model,
        "quant": options.quant,
        "policy": options.policy,
        "alpha_high": thresholds.alpha_high,
        "alpha_low": thresholds.alpha_low,
        "window": options.window,
        "rotate": options.rotation(),
        "max_tokens": args.max_tokens,
    }
    row = Row(HEADS, case, summarize(insights), collect(prompts.device()))
    if args.json:
        print(row.to_json())
    else:
        from diffkv.cli.heatmap import print_maps

        print_maps(row)
    if args.out is not None:
        _write(args, row, insights[0])
    return 0


def _write(args: argparse.Namespace, row: "Row", first: "Insight") -> None:
    from diffkv.cli.heatmap import tokens_html
    from diffkv.lab.report.heads import draw_heads

    tiers = first.tiers[args.layer][args.head]
    tokens = {"layer": args.layer, "head": args.head, "texts": first.texts, "tiers": tiers}
    draw_heads(args.out / PNG, row)
    (args.out / HTML).write_text(
        tokens_html(row, args.layer, args.head, first.texts, tiers), encoding="utf-8"
    )
    seen = replace(row, measured={**row.measured, "tokens": tokens})
    (args.out / JSON).write_text(seen.to_json() + "\n", encoding="utf-8")
    if not args.json:
        print(f"{PNG}, {HTML} and {JSON} are in {args.out}")
