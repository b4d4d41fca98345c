"""`diffkv report FILES --out DIR`: result files as tables and plots."""

import argparse
from pathlib import Path

from diffkv.quant import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="JSON lines of diffkv eval, bench or inspect; runs that differ in their "
        "seed alone are averaged",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for report.md and plots"
    )
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    parser.add_argument("--csv", action="store_true", help="write tasks.csv and distances.csv too")


def run(args: argparse.Namespace) -> int:
    """Read everything, then write everything."""
    from diffkv.lab import plots
    from diffkv.lab.report.load import read
    from diffkv.lab.report.pages import write

    if not args.no_plots:
        plots.require()
    loaded = read(args.files)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        names = write(loaded, args.out, not args.no_plots, args.csv)
    except OSError as error:
        raise ConfigError(f"cannot write to --out {args.out}: {error.strerror}") from None
    print(f"{len(loaded.rows)} results; in {args.out}: {', '.join(names)}")
    return 0
