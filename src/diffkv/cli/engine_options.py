"""Options that `generate` and `serve` share: those of the cache."""

import argparse

from diffkv.vllm_plugin.options import DEFAULT_QUANT, Options

__all__ = ["REFERENCE", "add_cache_options", "cache_options", "model_folder"]

REFERENCE = "reference"
"""Name of the model that ships with the package."""


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Declare the cache's options."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--quant",
        default=DEFAULT_QUANT,
        help="formats of the tiers: k8v4-k4v2, k8v4g1x2-k4v2g2x4, k8v8, k16v16 … (default: "
        "%(default)s)",
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
        "--kernels", choices=["reference"], help="run the plain torch operations (slow)"
    )


def cache_options(args: argparse.Namespace) -> Options:
    """Read them back."""
    names = ("quant", "alpha_high", "alpha_low", "window", "page_bytes", "kernels")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Options.parse(given)


def model_folder(name: str) -> str:
    """The folder of the shipped model for its name; any other name as it is."""
    from importlib.resources import files

    return str(files("diffkv") / "data" / REFERENCE) if name == REFERENCE else name
