"""Drives an in-process engine step by step, and looks at both sides of its accounting on the way."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import MODEL

from diffkv import pool

MOST_STEPS = 5000


@dataclass
class Request:
    """One for `drive`.

    Attributes:
        prompt: token ids, or text.
        new_tokens: to generate, greedily.
        extra_args: DiffKV's settings.
    """

    prompt: list[int] | str
    new_tokens: int = 24
    extra_args: dict[str, Any] | None = None


@dataclass
class Driven:
    """What came of the requests, by name.

    Attributes:
        token_ids: generated.
        kept: (high, low) tokens over all layers and heads, after the last step in which it ran.
        running_peak: requests at once.
    """

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    running_peak: int = 0


def shipped_prompts() -> list[str]:
    lines = (Path(MODEL).parent / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def manager(llm: Any) -> Any:
    (ours,) = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    return ours


def worker() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker


def usable_blocks(llm: Any) -> int:
    """vLLM's blocks that requests can have: all but the null block and the tables' share."""
    return manager(llm).block_pool.num_gpu_blocks - 1


def blocks_in_use(llm: Any) -> int:
    return usable_blocks(llm) - manager(llm).block_pool.get_num_free_blocks()


def outside_name(request_id: str) -> str:
    """The name that a request was added under: vLLM appends a dash and random characters."""
    return request_id.rsplit("-", 1)[0]


def add(llm: Any, name: str, request: Request) -> None:
    from vllm import SamplingParams

    prompt = request.prompt
    llm.llm_engine.add_request(
        name,
        prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt},
        SamplingParams(
            temperature=0,
            max_tokens=request.new_tokens,
            ignore_eos=True,
            extra_args=request.extra_args,
        ),
    )


def drive(
    llm: Any,
    requests: Mapping[str, Request],
    after_step: Callable[[int], None] | None = None,
) -> Driven:
    """Add requests and step until none is left, then once more, which carries the last ends down."""
    for name, request in requests.items():
        add(llm, name, request)
    driven = Driven()
    ours = llm.llm_engine.vllm_config.kv_transfer_config is not None
    for step in range(MOST_STEPS):
        if not llm.llm_engine.has_unfinished_requests():
            break
        for output in llm.llm_engine.step():
            driven.token_ids[output.request_id] = list(output.outputs[0].token_ids)
        driven.running_peak = max(driven.running_peak, len(scheduler(llm).running))
        if ours:
            for request_id, request in worker()._slots.requests.items():
                high, low = worker().state.num_tokens[request.slot].sum((0, 1)).tolist()
                driven.kept[outside_name(request_id)] = (high, low)
        if after_step is not None:
            after_step(step)
    llm.llm_engine.step()
    return driven


def check_empty(llm: Any) -> None:
    """No request: no page is held, no block in use, and vLLM's gauge says so."""
    pool.check_invariants(worker().state)
    assert worker().accounts.num_held == 0
    assert not worker()._slots.requests
    assert len(set(worker()._slots.free)) == worker().shape.num_slots
    assert int((worker()._slots.of_block >= 0).sum()) == 0
    assert blocks_in_use(llm) == 0
    assert scheduler(llm).kv_cache_manager.usage == 0
    ours = manager(llm)
    assert not any((ours.req_to_blocks, ours._running, ours._requests, ours._started))
    assert not scheduler(llm).connector.scheduler._thresholds


def check_quotas(llm: Any) -> None:
    """Blocks of every row cover its pages, and the gauge is that of blocks in use."""
    ours, state = manager(llm), worker().state
    pool.check_invariants(state)
    ours.store.check()
    paid = 0
    for running in ours._running.values():
        held_pages = int(state.num_pages_held[running.slot].sum())
        paid += len(running.blocks)
        assert len(running.blocks) * worker().shape.num_layers >= held_pages
    for row in ours.store._rows.values():
        assert len(row.blocks) * worker().shape.num_layers >= int(
            state.num_pages_held[row.slot].sum()
        )
        paid += len(row.blocks) if row.users else 0
    assert paid == blocks_in_use(llm)
    usage = scheduler(llm).kv_cache_manager.usage
    assert usage == 1 - (usable_blocks(llm) - paid) / usable_blocks(llm)
