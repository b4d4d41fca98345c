"""Engines for tests: one at a time, in pytest's own process unless a test asks for several."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

MODEL = str(Path(__file__).parents[2] / "src" / "diffkv" / "data" / "reference")
NUM_PROMPTS = 24
NEW_TOKENS = 160
KV_BYTES = 256 << 20


@dataclass
class Run:
    """What an engine made of some prompts."""

    token_ids: list[list[int]]
    preemptions: int
    summary: dict[str, Any] | None


def random_prompts(num: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts of 5 to `longest` tokens, of words that the model knows."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(5, longest, num).astype(int)
    return [[1, *rng.integers(10, 400, n - 1).tolist()] for n in rng.permutation(lengths)]


def metric(llm: Any, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)


@contextlib.contextmanager
def engine(
    quant: str | None = None, options: dict[str, Any] | None = None, **args: Any
) -> Iterator[Any]:
    """An engine on the shipped model; without `quant` with vLLM's own cache."""
    from diffkv.vllm_plugin import engine_args
    from diffkv.vllm_plugin.front import offline

    arguments: dict[str, Any] = {
        "model": MODEL,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": KV_BYTES,
        "disable_log_stats": False,
    }
    if quant is None:
        arguments["enable_prefix_caching"] = False
    else:
        arguments |= engine_args(quant, **(options or {}))
    with offline.engine(arguments | args) as llm:
        yield llm


def greedy(llm: Any, prompts: list[list[int]], new_tokens: int, **sampling: Any) -> Run:
    """Generate greedily, `new_tokens` for each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, **sampling)
    before = metric(llm, "vllm:num_preemptions")
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    is_ours = llm.llm_engine.vllm_config.kv_transfer_config is not None
    return Run(
        [list(output.outputs[0].token_ids) for output in outputs],
        int(metric(llm, "vllm:num_preemptions") - before),
        llm.collective_rpc("diffkv_summary")[0] if is_ours else None,
    )


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return random_prompts(NUM_PROMPTS, 900)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of an engine of two ranks."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    return {"tensor_parallel_size": 2}


@pytest.fixture(scope="session")
def stock(prompts: list[list[int]]) -> list[list[int]]:
    """Tokens that vLLM's own cache gives."""
    with engine() as llm:
        return greedy(llm, prompts, NEW_TOKENS).token_ids
