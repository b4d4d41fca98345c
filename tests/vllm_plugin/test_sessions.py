"""A request whose prompt comes in parts is answered as with vLLM's own cache, and harms nobody."""

import asyncio
from typing import Any

import pytest
import torch
from conftest import MODEL
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from diffkv.vllm_plugin import engine_args
from diffkv.vllm_plugin.messages import StepMessage
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.spec import DiffKVSpec

FACTS = {"k1": "v2", "k3": "v4", "k5": "v6"}
MAX_NUM_SEQS = 4
NUM_PARTS = 2 * MAX_NUM_SEQS
ASKED = [list(FACTS)[(i + 1) % 3] for i in range(NUM_PARTS)]
SAMPLING = SamplingParams(
    temperature=0, max_tokens=1, ignore_eos=True, output_kind=RequestOutputKind.DELTA
)


def prompt(part: int) -> str:
    facts = " ".join(f"{key} {value} ;" for key, value in FACTS.items())
    return f"{f'<bos> {facts} ' if part == 0 else '; '}? {ASKED[part]}"


async def session(llm: Any, name: str) -> list[str]:
    async def feed() -> Any:
        for part in range(NUM_PARTS):
            yield StreamingInput(prompt=prompt(part), sampling_params=SAMPLING)
            await asyncio.sleep(0.05 * (part % 2))

    outputs = llm.generate(feed(), SAMPLING, request_id=name)
    # vLLM joins what a reader has not fetched yet
    return " ".join([output.outputs[0].text async for output in outputs]).split()


async def plain(llm: Any, name: str) -> str:
    text = ""
    async for output in llm.generate(prompt(0), SAMPLING, request_id=name):
        text += output.outputs[0].text.strip()
    return text


async def run(options: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Two sessions at once, and a plain request after each second."""
    arguments = AsyncEngineArgs(
        model=MODEL,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=MAX_NUM_SEQS,
        kv_cache_memory_bytes=32 << 20,
        **options,
    )
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        sessions = await asyncio.gather(session(llm, "a"), session(llm, "b"))
        others = [await plain(llm, f"plain-{i}") for i in range(MAX_NUM_SEQS + 1)]
        return sessions, others
    finally:
        llm.shutdown()


@pytest.mark.parametrize(("quant", "overlap"), [("k16v16", True), ("k8v4-k4v2", False)])
def test_sessions_are_answered_and_the_engine_lives(quant: str, overlap: bool) -> None:
    options = {**engine_args(quant), "async_scheduling": overlap}
    sessions, others = asyncio.run(asyncio.wait_for(run(options), 240))
    right = [FACTS[key] for key in ASKED]
    assert sessions == [right, right]
    assert others == [right[0]] * len(others)


class Stepped:
    """vLLM's scheduler without an engine: every step's tokens are given back at once."""

    def __init__(self) -> None:
        args = engine_args("k8v4-k4v2")
        args["kv_transfer_config"] = KVTransferConfig(**args["kv_transfer_config"])
        config = EngineArgs(
            MODEL,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=MAX_NUM_SEQS,
            async_scheduling=False,
            **args,
        ).create_engine_config()
        base = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
        spec = DiffKVSpec.of(base, Options().layout(64, 4), 3, 512, MAX_NUM_SEQS)
        cache = config.cache_config
        cache.num_gpu_blocks, cache.block_size, cache.kv_cache_size_tokens = 1000, 16, 5003
        groups = [KVCacheGroupSpec(["a", "b", "c"], spec)]
        self.cache_config = cache
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(1000, [], groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=16,
            hash_block_size=16,
            log_stats=True,
        )

    def add(self, num_tokens: int, settings: dict[str, Any] | None = None) -> None:
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, extra_args=settings)
        ids = list(range(1, num_tokens + 1))
        self.scheduler.add_request(Request("s", ids, params, None, resumable=True))

    def step(self) -> StepMessage:
        output = self.scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        made = ModelRunnerOutput(
            names, {name: i for i, name in enumerate(names)}, [[7]] * len(names)
        )
        self.scheduler.update_from_output(output, made)
        message = output.kv_connector_metadata
        assert isinstance(message, StepMessage)
        return message


def test_each_part_is_an_admission_of_its_own() -> None:
    """Its pages are released before it starts again, so that it takes one slot at any time."""
    world = Stepped()
    world.add(20)
    world.add(10, {"diffkv": "off"})
    world.add(5)
    running = 0
    started = []
    for _ in range(12):
        message = world.step()
        running += len(message.started) - len(message.ended)
        assert running <= 1
        started += message.started
    # All tokens but the last that was generated are the next part's prompt
    assert [start.prompt_len for start in started] == [20, 20 + 1 + 10, 31 + 1 + 5]
    assert [start.epoch for start in started] == [1, 2, 3]
    assert [start.thresholds.alpha_high for start in started] == [20.0, 0.0, 20.0]
    world.scheduler.finish_requests("s", RequestStatus.FINISHED_ABORTED)
    assert world.step().ended == {"s"}
    assert world.scheduler.kv_cache_manager.usage == 0


def test_blocks_times_tokens_of_a_block_are_the_capacity() -> None:
    cache = Stepped().cache_config
    assert cache.num_gpu_blocks * cache.block_size == 5003 // 16 * 16
