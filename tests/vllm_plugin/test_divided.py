"""Models in which only some layers have full attention: those have DiffKV's cache, the others vLLM's."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make
from conftest import engine, greedy, random_prompts
from stepping import Request, add, check_empty, check_quotas, drive, manager, scheduler
from test_models import MAX_DRIFT, THRESHOLDS, WINDOW_ONLY, Answer, arguments, decode, drift

from diffkv.quant import ConfigError

NEW_TOKENS = 100
PROMPTS = random_prompts(12, 700)
"""Far longer than the window of 64 tokens, and than a block."""
LITTLE_BYTES = 9_500_000
LITTLE = {"kv_cache_memory_bytes": LITTLE_BYTES, "max_num_batched_tokens": 96}
"""With preemptions, and prompts in chunks."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("gemma3", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def stock(model: Path) -> tuple[list[list[int]], list[Answer]]:
    """Tokens that vLLM's own cache gives, and what it makes of the prompts of `test_models`."""
    with engine(**settings(model, enable_prefix_caching=False)) as llm:
        return greedy(llm, PROMPTS, NEW_TOKENS).token_ids, decode(llm)


def settings(model: Path, **others: Any) -> dict[str, Any]:
    return {**arguments(model, max_model_len=1024), "enable_prefix_caching": None, **others}


@pytest.mark.parametrize(
    ("others", "preempted"),
    [
        pytest.param({}, False, id="whole prompts"),
        pytest.param({"max_num_batched_tokens": 96}, False, id="chunked prompts"),
        pytest.param(LITTLE, True, id="preemptions and chunks"),
    ],
)
def test_lossless_tokens_equal_stock(
    model: Path, stock: tuple[list[list[int]], Any], others: dict[str, Any], preempted: bool
) -> None:
    with engine("k16v16", **settings(model, **others)) as llm:
        run = greedy(llm, PROMPTS, NEW_TOKENS)
        assert run.token_ids == stock[0]
        llm.llm_engine.step()  # the workers hear of the last end
        check_empty(llm)
    assert (run.preemptions > 0) == preempted


def test_tokens_equal_stock_in_several_processes(
    monkeypatch: pytest.MonkeyPatch, model: Path, stock: tuple[list[list[int]], Any]
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    with engine("k16v16", **settings(model, **LITTLE)) as llm:
        run = greedy(llm, PROMPTS, NEW_TOKENS)
    assert run.token_ids == stock[0]
    assert run.preemptions > 0


def test_tokens_of_two_ranks_equal_stock(
    model: Path, stock: tuple[list[list[int]], Any], two_ranks: dict[str, Any]
) -> None:
    """A rank has half of the heads, so half of the memory does."""
    little = {**LITTLE, "kv_cache_memory_bytes": LITTLE_BYTES // 2}
    with engine("k16v16", **settings(model, **little, **two_ranks)) as llm:
        run = greedy(llm, PROMPTS, NEW_TOKENS)
        llm.llm_engine.step()
        ranks = llm.collective_rpc("diffkv_summary")
    assert run.token_ids == stock[0]
    assert run.preemptions > 0
    assert [rank["pool"]["pages_held"] for rank in ranks] == [0, 0]


def test_lossy_drift_is_bounded(model: Path, stock: tuple[Any, list[Answer]]) -> None:
    with engine("k8v4-k4v2", THRESHOLDS, **settings(model)) as llm:
        lossy = drift(stock[1], decode(llm, diffkv="off"))
        tiered = decode(llm)
        window_only = drift(stock[1], decode(llm, **WINDOW_ONLY))
        llm.llm_engine.step()
        check_empty(llm)
    assert lossy < MAX_DRIFT
    assert lossy < window_only
    assert all(len(answer.token_ids) == len(stock[1][0].token_ids) for answer in tiered)


def test_chunks_equal_stock(tmp_path: Path) -> None:
    """Chunks of 128 tokens: prompts are of several, and so are the parts in which they are computed."""
    model = make("llama4", tmp_path)
    with engine(**settings(model, enable_prefix_caching=False)) as llm:
        tokens = greedy(llm, PROMPTS, NEW_TOKENS).token_ids
    little = {**LITTLE, "kv_cache_memory_bytes": 6_000_000}
    with engine("k16v16", **settings(model, **little)) as llm:
        run = greedy(llm, PROMPTS, NEW_TOKENS)
        llm.llm_engine.step()
        check_empty(llm)
    assert run.token_ids == tokens
    assert run.preemptions > 0


def test_either_part_may_run_out(model: Path) -> None:
    """Requests, some of them aborted, with too few blocks and too small a pool for all of them."""
    prompts = {f"{i}": Request(prompt, 40) for i, prompt in enumerate(PROMPTS)}
    little = settings(model, kv_cache_memory_bytes=LITTLE_BYTES, max_num_batched_tokens=128)
    with engine("k8v4-k4v2", THRESHOLDS, **little) as llm:

        def after_step(step: int) -> None:
            check_quotas(llm)
            if step % 16 == 5:
                add(llm, f"gone{step}", Request(PROMPTS[step % len(PROMPTS)], 40))
            if step % 16 == 9:
                gone = [each for each in scheduler(llm).requests if each.startswith("gone")]
                llm.llm_engine.abort_request(gone, internal=True)

        driven = drive(llm, prompts, after_step)
        check_empty(llm)
    assert all(len(driven.token_ids[name]) == 40 for name in prompts)
    assert driven.running_peak > 1


def test_the_division_holds_what_vllm_was_given(model: Path) -> None:
    with engine("k8v4-k4v2", **settings(model)) as llm:
        config = llm.llm_engine.vllm_config
        division, ours = manager(llm)._division, manager(llm)
        given = config.cache_config.kv_cache_memory_bytes
        theirs = scheduler(llm).kv_cache_manager.block_pool
        assert 0 <= given - division.pool_bytes - division.blocks_bytes < division.block_bytes
        assert theirs.num_gpu_blocks == division.num_blocks
        shape = ours.shape
        assert shape.num_pages * shape.page_bytes + shape.table_bytes <= division.pool_bytes
        assert (division.num_layers, division.num_others) == (2, 4)
        assert not config.cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"enable_prefix_caching": True}, "leave out --enable-prefix-caching"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"kv_cache_memory_bytes": 1 << 20}, "KV cache is needed"),
    ],
)
def test_refusals(model: Path, flags: dict[str, Any], message: str) -> None:
    with (
        pytest.raises(ConfigError, match=message) as refused,
        engine("k16v16", **settings(model, **flags)),
    ):
        pass
    assert "\n" not in str(refused.value)


async def session(quant: str | None, arguments: dict[str, Any]) -> list[int]:
    """Tokens that follow each part of a prompt."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    from diffkv.vllm_plugin import engine_args

    each = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )

    async def parts() -> Any:
        for prompt in PROMPTS[:3]:
            yield StreamingInput(prompt={"prompt_token_ids": prompt[:150]}, sampling_params=each)

    more = {} if quant is None else engine_args(quant)
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, **more))
    try:
        outputs = llm.generate(parts(), each, request_id="s")
        return [token async for output in outputs for token in output.outputs[0].token_ids]
    finally:
        llm.shutdown()


def test_a_prompt_in_parts_is_computed_anew_in_layers_of_either_kind(model: Path) -> None:
    engines = {**settings(model), "dtype": "float32", "enforce_eager": True}
    stock, ours = (
        asyncio.run(asyncio.wait_for(session(quant, engines), 120)) for quant in (None, "k16v16")
    )
    assert ours == stock
    assert len(stock) > 4
