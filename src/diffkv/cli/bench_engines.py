"""What the commands of `diffkv bench` share that start engines: options, and what is made of them."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkv.cli.arguments import positive
from diffkv.cli.engine_options import model_folder
from diffkv.cli.models import check_hub
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.rows import Writer

__all__ = [
    "BENCH_SMALL",
    "add_model",
    "add_thresholds",
    "engine_flags",
    "find_model",
    "make_writer",
    "model_facts",
    "options_by_quant",
    "room_for",
]

BENCH_SMALL = "bench-small"
"""Sizes of the model that is made up where none is named."""


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Declare which model is measured."""
    source = parser.add_mutually_exclusive_group()
    shown = "" if default is None else f" (default: {default})"
    source.add_argument("--model", help=f"a folder, a model id, or 'reference'{shown}")
    source.add_argument("--random-weights", metavar="NAME", help="sizes of a known model")
    parser.epilog = "Any other option is passed on to vLLM's engine, in all settings."


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    """Declare DiffKV's options that are the same for all formats."""
    parser.add_argument("--alpha-high", type=float)
    parser.add_argument("--alpha-low", type=float)
    parser.add_argument("--window", type=positive, help="most recent tokens that stay high")
    parser.add_argument(
        "--segment", type=int, help="tokens after which a prompt is decided, as of diffkv serve"
    )


def make_writer(args: argparse.Namespace, device: str) -> "Writer":
    """Where the rows go; a plot that cannot be drawn is refused before anything is measured."""
    from diffkv.lab import plots
    from diffkv.lab.provenance import collect
    from diffkv.lab.rows import Writer

    if getattr(args, "plot", None):
        plots.require()
    here = collect(device)
    if "DIFFKV_COMMIT" in os.environ:  # sources without their repository
        here = replace(here, commit=os.environ["DIFFKV_COMMIT"])
    return Writer(here, args.out, args.json)


def options_by_quant(
    args: argparse.Namespace, quants: Sequence[str], **more: Any
) -> list[dict[str, Any]]:
    """DiffKV's options for each of some formats; what they do not take is refused before anything runs.

    Args:
        args: the command line's thresholds.
        quants: formats.
        more: options besides, None where they are not given.
    """
    from diffkv.vllm_plugin.options import Options

    found = []
    for quant in quants:
        given = {
            "quant": quant, "alpha_high": args.alpha_high, "alpha_low": args.alpha_low,
            "window": args.window, "segment": args.segment, **more,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        Options.parse(given)
        found.append(given)
    return found


def find_model(
    args: argparse.Namespace, folder: Path
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The model's folder or id, arguments of the engine for it, and its `config.json`.

    Args:
        args: the command line's, see `add_model`.
        folder: where a model that is made up is written.
    """
    from diffkv.lab.bench import models

    if args.model is None:
        name = args.random_weights or BENCH_SMALL
        load_format = models.write_model(name, folder)
        return str(folder), {"load_format": load_format}, models.find(name)
    from diffkv.vllm_plugin.front.offline import check_model

    model = model_folder(args.model)
    check_model(model)
    check_hub(model)
    config = Path(model) / "config.json"
    return model, {}, json.loads(config.read_text()) if config.is_file() else {}


def model_facts(args: argparse.Namespace, engine: dict[str, Any]) -> dict[str, Any]:
    """What rows say of the model."""
    name = args.model or args.random_weights or BENCH_SMALL
    return {"model": name, "weights": engine.get("load_format", "own")}


def room_for(requests: int, config: dict[str, Any], longest: int) -> int:
    """A KV budget for so many requests in bf16, see `throughput.room_for`.

    Raises:
        ConfigError: the model's sizes are not known.
    """
    from diffkv.lab.bench import throughput

    if not config:
        raise ConfigError("a model id needs --kv-bytes: the sizes of its cache are not known here")
    return throughput.room_for(requests, config, longest)


def engine_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's engine that were passed on."""
    if not args.flags:
        return {}
    from diffkv.vllm_plugin.front.offline import engine_flags as read

    return read(args.flags)
