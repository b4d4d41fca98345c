"""Options that commands with an engine share: those of the cache."""

import argparse
import sys
from typing import Any

from diffkv import presets
from diffkv.cli.models import load_config
from diffkv.presets import Preset
from diffkv.quant import LayerQuant
from diffkv.rotation import ROTATIONS
from diffkv.vllm_plugin.options import ADMISSIONS, DEFAULT_QUANT, Options

__all__ = ["REFERENCE", "SHIPPED", "add_cache_options", "cache_options", "model_folder"]

REFERENCE = "reference"
"""Name of the model that commands take by default."""

SHIPPED = (REFERENCE, "reference-128")
"""Names of the models that ship with the package: head_dim 64 and 128, same words."""


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Declare the cache's options."""
    group = parser.add_argument_group("cache")
    names = ", ".join(preset.name for preset in presets.PRESETS)
    group.add_argument(
        "--preset", metavar="NAME",
        help=f"formats and thresholds by name: {presets.AUTO} (by the model), {names}; options below "
        f"override its values (default: those of {presets.DEFAULT})",
    )  # fmt: skip
    group.add_argument(
        "--quant",
        help="formats of the tiers: k8v4-k4v2, k8v4g1x2-k4v2g2x4, k8v8, k16v16 …; by layer: "
        f"0-3:k8v8,4-:k8v4-k4v2 (default: {DEFAULT_QUANT})",
    )
    group.add_argument(
        "--alpha-high", type=float, help="a token stays high if its mean attention is >= this / N"
    )
    group.add_argument(
        "--alpha-low", type=float, help="and is dropped if it is < this / N (default: 0, nothing)"
    )
    group.add_argument("--window", type=int, help="most recent tokens that always stay high")
    group.add_argument("--page-bytes", type=int, help="bytes of a page (default: least waste)")
    group.add_argument(
        "--rotate", choices=ROTATIONS,
        help="hadamard spreads outliers of keys and values before they are quantised (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--kernels", choices=["reference"], help="run the plain torch operations (slow)"
    )
    group.add_argument(
        "--admission", choices=ADMISSIONS,
        help=f"what is set aside for a prompt: the size expected of it, or its worst case (default: "
        f"{ADMISSIONS[0]})",
    )  # fmt: skip


def cache_options(args: argparse.Namespace) -> Options:
    """Read them back; say on standard error which preset was taken, if one was asked for.

    Raises:
        ConfigError: an unknown preset, a model that cannot be read for `auto`, or a bad value.
    """
    names = (
        "quant", "alpha_high", "alpha_low", "window", "page_bytes", "rotate", "kernels", "admission"
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.preset is None:
        return Options.parse(given)
    if args.preset == presets.AUTO:
        preset, why = presets.choose(load_config(model_folder(args.model)))
        why = f"chosen by {presets.AUTO}: {why}"
    else:
        preset = presets.find(args.preset)
        why = preset.description
    options = Options.parse(_override(preset, given))
    thresholds = options.thresholds()
    print(
        f"diffkv: preset {preset.name} ({why}): {options.quant}, alpha_high "
        f"{thresholds.alpha_high:g}, alpha_low {thresholds.alpha_low:g}, window {options.window}"
        f"{', with your ' + ', '.join(given) if given else ''}",
        file=sys.stderr,
    )
    return options


def _override(preset: Preset, given: dict[str, Any]) -> dict[str, Any]:
    """A preset's values with a user's in their place.

    Without a low tier alpha_low is the only threshold. Where a user's threshold would cross the
    preset's other one, that one moves along.
    """
    values = {
        "quant": preset.quant,
        "window": preset.window,
        "alpha_low": preset.alpha_low,
        **given,
    }
    if not LayerQuant.parse(values["quant"]).has_low:
        return values
    values.setdefault("alpha_high", max(preset.alpha_high, values["alpha_low"]))
    if "alpha_low" not in given:
        values["alpha_low"] = min(preset.alpha_low, values["alpha_high"])
    return values


def model_folder(name: str) -> str:
    """The folder of a shipped model for its name; any other name as it is."""
    from importlib.resources import files

    return str(files("diffkv") / "data" / name) if name in SHIPPED else name
