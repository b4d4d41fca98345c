"""Storing 16 bits and dropping nothing, every token must equal that of vLLM's own cache."""

from typing import Any

import pytest
from conftest import NEW_TOKENS, engine, greedy

LOSSLESS = "k16v16"
SMALL_POOL_BYTES = 14 << 20
"""Holds the longest prompt with its answer, and a fraction of all of them."""


@pytest.mark.parametrize(
    ("arguments", "preempted"),
    [
        pytest.param({}, False, id="whole prompts"),
        pytest.param({"max_num_batched_tokens": 96}, False, id="chunked prompts"),
        pytest.param({"kv_cache_memory_bytes": SMALL_POOL_BYTES}, True, id="preemptions"),
        pytest.param(
            {"kv_cache_memory_bytes": SMALL_POOL_BYTES, "max_num_batched_tokens": 64},
            True,
            id="preemptions and chunks",
        ),
    ],
)
def test_tokens_equal_stock(
    arguments: dict[str, Any],
    preempted: bool,
    prompts: list[list[int]],
    stock: list[list[int]],
) -> None:
    with engine(LOSSLESS, max_model_len=1152, **arguments) as llm:
        run = greedy(llm, prompts, NEW_TOKENS)
    assert run.token_ids == stock
    assert (run.preemptions > 0) == preempted
    assert run.summary is not None
    assert run.summary["totals"]["num_pages"] > 0


def test_tokens_equal_stock_in_several_processes(
    monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], stock: list[list[int]]
) -> None:
    """The worker with two threads, for those in one process may have one."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    with engine(LOSSLESS, max_num_batched_tokens=256) as llm:
        run = greedy(llm, prompts, NEW_TOKENS)
    assert run.token_ids == stock
