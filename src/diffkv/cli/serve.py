"""`diffkv serve MODEL`: vLLM's OpenAI server with a compressed cache."""

import argparse

from diffkv.cli.engine_options import add_cache_options, cache_options, model_folder
from diffkv.cli.models import check_hub

__all__ = ["PASSES_FLAGS_ON", "add_arguments", "run"]

PASSES_FLAGS_ON = True
"""Options that are not listed here are vLLM's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", help="a folder, a model id, or a shipped model: reference, reference-128"
    )
    add_cache_options(parser)
    parser.epilog = "Any other option is passed on to vllm serve: --port, --max-model-len, …"


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    from diffkv.vllm_plugin.front.server import serve

    model = model_folder(args.model)
    check_hub(model)
    return serve(model, args.model, cache_options(args), args.flags)
