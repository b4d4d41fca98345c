"""Options that commands with an engine share: those of the cache."""

import argparse
import sys
from pathlib import Path
from typing import Any

from diffkv import presets
from diffkv.cli.arguments import Switch, flag_of, num_bytes
from diffkv.cli.models import config_file, load_config
from diffkv.fetch import MODELS, fetch_model
from diffkv.policies import PAPER
from diffkv.presets import Preset
from diffkv.quant import ConfigError, QuantConfig
from diffkv.rotation import ROTATIONS
from diffkv.segments import SEGMENT
from diffkv.vllm_plugin.options import ADMISSIONS, DEFAULT_QUANT, Options

__all__ = [
    "DEFAULT_QUANT",
    "REFERENCE",
    "SHIPPED",
    "add_cache_options",
    "cache_options",
    "model_folder",
    "preset_options",
]

REFERENCE = "reference"
"""Name of the model that commands take by default."""

SHIPPED = (REFERENCE, "reference-128")
"""Names of the models that ship with the package: head_dim 64 and 128, same words."""

CALIBRATED = ("quant", "alpha_high", "alpha_low", "window", "segment", "policy")
"""Options that a calibration sets."""


POLICY_HELP = (
    "what decides a prompt: paper; paper:distinct=0.75 also drops the quarter of it whose keys are most "
    "alike (default: paper)"
)


def add_cache_options(parser: argparse.ArgumentParser, policy_help: str = POLICY_HELP) -> None:
    """Declare the cache's options."""
    group = parser.add_argument_group("cache")
    names = ", ".join(preset.name for preset in presets.PRESETS)
    group.add_argument(
        "--preset", metavar="NAME",
        help=f"formats and thresholds by name: {presets.AUTO} (by the model), {names}; options below "
        f"override its values (default: those of {presets.DEFAULT})",
    )  # fmt: skip
    group.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="formats, thresholds, window, segment and policy that diffkv calibrate chose for a model",
    )  # fmt: skip
    group.add_argument(
        "--quant",
        help="formats of the tiers: k8v8-k4v2, k8v4g1x2-k4v2g2x4, k8v8, k16v16 … (default: "
        f"{DEFAULT_QUANT})",
    )
    group.add_argument(
        "--alpha-high", type=float, help="a token stays high if its mean attention is >= this / N"
    )
    group.add_argument(
        "--alpha-low", type=float, help="and is dropped if it is < this / N (default: 0, nothing)"
    )
    group.add_argument(
        "--drops", action=Switch,
        help="keep what a request needs to set diffkv_alpha_low: 8 bytes a low token (default: only if "
        "--alpha-low is above 0)",
    )  # fmt: skip
    group.add_argument("--policy", help=policy_help)
    group.add_argument("--window", type=int, help="most recent tokens that always stay high")
    group.add_argument(
        "--segment", type=int,
        help=f"tokens after which a prompt is decided, so that others can share them (default: "
        f"{SEGMENT}; 0: prompts are decided whole, nothing is shared)",
    )  # fmt: skip
    group.add_argument(
        "--page-bytes", type=num_bytes, help="bytes of a page (default: least waste)"
    )
    group.add_argument(
        "--rotate", choices=ROTATIONS,
        help="hadamard spreads outliers of keys and values before they are quantised (default: wherever "
        "something is)",
    )  # fmt: skip
    group.add_argument(
        "--kernels", choices=["reference"], help="run the plain torch operations (slow)"
    )
    group.add_argument(
        "--admission", choices=ADMISSIONS,
        help=f"what is set aside for a prompt: the size expected of it, or its worst case (default: "
        f"{ADMISSIONS[0]})",
    )  # fmt: skip


def cache_options(args: argparse.Namespace, takes_policy: bool = True) -> Options:
    """Read them back; say on standard error which preset or calibration was taken, if one was named.

    Args:
        args: the command line's.
        takes_policy: whether --policy is among the options; else the command reads it itself.

    Raises:
        ConfigError: an unknown preset, a model that cannot be read for `auto`, a calibration of another
            model or with an option that it sets, or a bad value.
    """
    names = (
        "policy", "quant", "alpha_high", "alpha_low", "drops", "window", "segment", "page_bytes",
        "rotate", "kernels", "admission",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not takes_policy:
        given.pop("policy", None)
    if args.calibration is not None:
        return _calibrated(args, given)
    if args.preset is None:
        return Options.parse(given)
    if args.preset == presets.AUTO:
        preset, why = presets.choose(load_config(model_folder(args.model)))
        why = f"chosen by {presets.AUTO}: {why}"
    else:
        preset = presets.find(args.preset)
        why = preset.description
    options = preset_options(preset, given)
    if preset.loss is not None and not given:
        why = f"{why}; {preset.loss}"
    yours = f", with your {', '.join(given)}" if given else ""
    print(f"diffkv: preset {preset.name} ({why}): {_words(options)}{yours}", file=sys.stderr)
    return options


def _words(options: Options) -> str:
    thresholds = options.thresholds()
    policy = f", policy {options.policy}" if options.policy != PAPER.text else ""
    return (
        f"{options.quant}, alpha_high {thresholds.alpha_high:g}, alpha_low "
        f"{thresholds.alpha_low:g}, window {options.window}{policy}"
    )


def _calibrated(args: argparse.Namespace, given: dict[str, Any]) -> Options:
    """What a calibration chose; only options that it does not set may stand beside it."""
    from diffkv.lab.calibrate import file

    names = [name for name in (*CALIBRATED, "preset") if getattr(args, name) is not None]
    if names:
        flags = " and ".join(flag_of(name) for name in names)
        raise ConfigError(
            f"--calibration sets formats, thresholds, window, segment and policy: leave out {flags}"
        )
    calibration = file.read(args.calibration)
    if calibration.model.config_sha256 != file.model_digest(config_file(model_folder(args.model))):
        raise ConfigError(
            f"--calibration {args.calibration} is of {calibration.model.name}, and {args.model} has "
            f"another configuration: calibrate it, or leave the option out"
        )
    options = Options.parse({**given, **calibration.values()})
    print(
        f"diffkv: calibration {args.calibration} ({calibration.finding()}): {_words(options)}",
        file=sys.stderr,
    )
    return options


def preset_options(preset: Preset, given: dict[str, Any]) -> Options:
    """A preset's values with a user's in their place.

    Without a low tier alpha_low is the only threshold. Where a user's threshold would cross the
    preset's other one, that one moves along.
    """
    values = {
        "quant": preset.quant,
        "window": preset.window,
        "policy": preset.policy,
        "alpha_low": preset.alpha_low,
        **given,
    }
    if QuantConfig.parse(values["quant"]).has_low:
        values.setdefault("alpha_high", max(preset.alpha_high, values["alpha_low"]))
        if "alpha_low" not in given:
            values["alpha_low"] = min(preset.alpha_low, values["alpha_high"])
    return Options.parse(values)


def model_folder(name: str) -> str:
    """The folder of a model that ships or is fetched, for its name; any other name as it is.

    Raises:
        ConfigError: a model that ships is not part of this installation, or one that is fetched is not
            there yet and cannot be had.
    """
    from importlib.resources import files

    if name in MODELS:
        return str(fetch_model(MODELS[name]))
    if name not in SHIPPED:
        return name
    folder = files("diffkv") / "data" / name
    if not folder.is_dir():
        raise ConfigError(
            f"the model {name} comes with the repository, not with the package: clone it, or take "
            f"{REFERENCE}"
        )
    return str(folder)
