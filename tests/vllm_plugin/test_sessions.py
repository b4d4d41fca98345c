"""A request whose prompt comes in parts is answered as with vLLM's own cache, and harms nobody."""

import asyncio
from typing import Any

import pytest
from conftest import MODEL
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from diffkv.vllm_plugin import engine_args

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

    return [
        output.outputs[0].text.strip()
        async for output in llm.generate(feed(), SAMPLING, request_id=name)
        if output.outputs[0].text
    ]


async def plain(llm: Any, name: str) -> str:
    text = ""
    async for output in llm.generate(prompt(0), SAMPLING, request_id=name):
        text += output.outputs[0].text.strip()
    return text


async def run(options: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Two sessions at once, and a plain request after each second."""
    arguments = AsyncEngineArgs(
        model=MODEL, dtype="float32", enforce_eager=True, max_model_len=1024,
        max_num_seqs=MAX_NUM_SEQS, kv_cache_memory_bytes=32 << 20, **options,
    )  # fmt: skip
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        sessions = await asyncio.gather(session(llm, "a"), session(llm, "b"))
        others = [await plain(llm, f"plain-{i}") for i in range(MAX_NUM_SEQS + 1)]
        return sessions, others
    finally:
        llm.shutdown()


@pytest.mark.parametrize("quant", ["k16v16", "k8v4-k4v2"])
@pytest.mark.parametrize("overlap", [False, True])
def test_sessions_are_answered_and_the_engine_lives(quant: str, overlap: bool) -> None:
    options = {**engine_args(quant), "async_scheduling": overlap}
    sessions, others = asyncio.run(asyncio.wait_for(run(options), 240))
    right = [FACTS[key] for key in ASKED]
    assert sessions == [right, right]
    assert others == [right[0]] * len(others)
