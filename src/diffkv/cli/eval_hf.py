"""The model of `diffkv eval --engine hf`."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffkv.cli import prompts
from diffkv.cli.engine_options import REFERENCE, model_folder
from diffkv.quant import ConfigError

if TYPE_CHECKING:
    from diffkv.lab.evaluation.hf_runs import HFModel

__all__ = ["loaded"]


@contextlib.contextmanager
def loaded(args: argparse.Namespace) -> "Iterator[HFModel]":
    """Load the model in its dtype and on its device; while it is used, torch has its threads.

    Raises:
        ConfigError: there is no such device, or transformers cannot load the model.
    """
    import torch

    from diffkv.lab.evaluation import hf_runs

    device = args.device or prompts.device()
    if device == "cuda" and prompts.device() == "cpu":
        raise ConfigError("--device cuda: torch sees no GPU; leave it out, or use cpu")
    name = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    dtype: torch.dtype = getattr(torch, name)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or (1 if args.model == REFERENCE else before))
    try:
        yield hf_runs.load(model_folder(args.model), dtype, args.batch_size, device)
    finally:
        torch.set_num_threads(before)
