"""One kind of models on a GPU, beside vLLM's own cache: engines in a process of their own.

    python tests/gpu/hybrids.py gemma3 --dtype bfloat16 --graphs    # one line of JSON

Kernels add numbers in bf16 in different orders, so tokens need not be equal. What such an order is worth
is measured first: vLLM's own cache, prompts together and one by one.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch
from checkpoints import make
from drift import LIKELIEST_KEPT, Answer, answer, drift, num_equal

__all__ = ["FAMILIES", "NEW_TOKENS", "NUM_PROMPTS"]

FAMILIES = ("gemma3", "llama4", "granite_head64", "falcon_h1", "qwen3_next")
NUM_PROMPTS, LONGEST, NEW_TOKENS = 8, 600, 48
"""Prompts up to many times longer than a window, and than a chunk."""
MAX_BATCHED = 768
"""Tokens of a step: some prompts come in chunks, beside others' generated tokens."""
KV_BYTES = 64 << 20
THRESHOLDS = {"alpha_high": 2.0, "alpha_low": 1.0}
FORGETFUL = {"diffkv_alpha_high": 1e6, "diffkv_alpha_low": 1e6}
SHARE = 0.03
"""Of the GPU's memory, which other engines may use, too: more than these ones take."""


def prompts() -> list[list[int]]:
    """Token ids of prompts of 5 to LONGEST tokens."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(5, LONGEST, NUM_PROMPTS).astype(int)
    return [[1, *rng.integers(10, 400, n - 1).tolist()] for n in rng.permutation(lengths)]


@contextmanager
def engine(args: dict[str, Any], quant: str | None = None, **options: Any) -> Iterator[Any]:
    """An engine, without `quant` with vLLM's own cache."""
    from diffkv.vllm_plugin import engine_args
    from diffkv.vllm_plugin.front import offline

    ours = {} if quant is None else engine_args(quant, **options)
    start = time.perf_counter()
    with offline.engine({**args, **ours}) as llm:
        print(
            f"{quant or 'stock'}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True
        )
        yield llm


def decode(llm: Any, wanted: list[list[int]], **settings: Any) -> list[Answer]:
    """Answer prompts greedily, with settings of requests."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        logprobs=LIKELIEST_KEPT,
        extra_args=settings or None,
    )
    each = [{"prompt_token_ids": prompt} for prompt in wanted]
    return [answer(output) for output in llm.generate(each, params, use_tqdm=False)]


def pages_held(llm: Any) -> int:
    """Of a pool without requests; a step without tokens has the worker hear of the last end."""
    llm.llm_engine.step()
    (summary,) = llm.collective_rpc("diffkv_summary")
    return int(summary["pool"]["pages_held"])


def backends(llm: Any) -> list[str]:
    """Names of the attention backends that layers have, in their order."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return [
        layer.get_attn_backend().__name__ for layer in layers if hasattr(layer, "get_attn_backend")
    ]


def measure(family: str, dtype: str, graphs: bool) -> Iterator[dict[str, Any]]:
    """Figures of one kind of models, as they come.

    Args:
        family: a key of `checkpoints.FAMILIES`.
        dtype: of weights and activations.
        graphs: whether with compiled code and CUDA graphs.
    """
    wanted = prompts()
    with tempfile.TemporaryDirectory() as folder:
        args = {
            "model": str(make(family, Path(folder), getattr(torch, dtype))),
            "dtype": dtype,
            "max_model_len": 1024,
            "max_num_seqs": NUM_PROMPTS,
            "max_num_batched_tokens": MAX_BATCHED,
            "kv_cache_memory_bytes": KV_BYTES,
            "gpu_memory_utilization": SHARE,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "enforce_eager": not graphs,
            "max_logprobs": LIKELIEST_KEPT,
        }
        if graphs:
            args["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, NUM_PROMPTS]}
        if family == "qwen3_next":  # vLLM would take flashinfer's kernel on Hopper
            args["additional_config"] = {"gdn_prefill_backend": "triton"}
        with engine(args) as llm:
            stock = decode(llm, wanted)
            alone = [each for prompt in wanted for each in decode(llm, [prompt])]
            config = llm.llm_engine.vllm_config
            yield {
                "second_runner": config.use_v2_model_runner,
                "graph_mode": config.compilation_config.cudagraph_mode.name,
                "stock_alone": drift(stock, alone),
                "stock_alone_equal": num_equal(stock, alone),
            }
        with engine(args, "k16v16") as llm:
            ours = decode(llm, wanted)
            again = decode(llm, wanted)
            yield {
                "backends": backends(llm),
                "k16v16": drift(stock, ours),
                "k16v16_equal": num_equal(stock, ours),
                "k16v16_again_equal": num_equal(ours, again),
                "k16v16_pages_held": pages_held(llm),
            }
        with engine(args, "k8v4-k4v2", **THRESHOLDS) as llm:
            all_high = decode(llm, wanted, diffkv="off")
            tiered = decode(llm, wanted)
            forgetful = decode(llm, wanted, **FORGETFUL)
            yield {
                "k8v4": drift(stock, all_high),
                "k8v4-k4v2": drift(stock, tiered),
                "window only": drift(stock, forgetful),
                "k8v4_pages_held": pages_held(llm),
            }


def main() -> None:
    """Measure one case; figures go to stderr as they come, and to stdout together."""
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--graphs", action="store_true")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for figures in measure(args.family, args.dtype, args.graphs):
        print(json.dumps(figures), file=sys.stderr, flush=True)
        found |= figures
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
