"""`diffkv report FILES --out DIR`: result files as tables and plots."""

import argparse
import importlib.util
from pathlib import Path

from diffkv.quant import ConfigError

__all__ = ["add_arguments", "run"]

REPORT = "report.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE",
        help="what diffkv eval --json or diffkv inspect --json printed, one object or one a line; "
        "runs that differ in their seed alone are averaged",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help=f"folder for {REPORT}, CSV files and plots",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Read everything, then write everything."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("diffkv report draws with matplotlib: pip install 'diffkv[plot]'")
    from diffkv.lab.report.load import read
    from diffkv.lab.report.plots import draw
    from diffkv.lab.report.tables import markdown, write_csv

    loaded = read(args.files)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tables = write_csv(loaded, args.out)
        plots = draw(loaded, args.out)
        (args.out / REPORT).write_text(markdown(loaded, plots), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to --out {args.out}: {error.strerror}") from None
    names = ", ".join([REPORT, *tables, *plots])
    print(f"{len(loaded.runs)} runs and {len(loaded.heads)} maps of heads; in {args.out}: {names}")
    return 0
