"""Copies a model with a cache that is harder to quantise, and the same answers.

    python training/reference_model/make_hostile.py src/diffkv/data/reference-128 out \
        --hostile k-outliers --scale 16

What each name does stands in `diffkv.lab.evaluation.hostile`. float32 keeps biases exact.
"""

import argparse
from pathlib import Path

import torch

from diffkv.lab.evaluation.hostile import REWRITINGS, rewrite


def main() -> None:
    """Parse the command line and rewrite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="must not exist")
    parser.add_argument("--hostile", choices=REWRITINGS, required=True)
    parser.add_argument("--scale", type=float, default=16.0, help="a power of two")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    rewrite(args.folder, args.out, args.hostile, args.scale, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
