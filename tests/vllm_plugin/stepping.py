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
        cache_salt: requests with different ones share nothing.
    """

    prompt: list[int] | str
    new_tokens: int = 24
    extra_args: dict[str, Any] | None = None
    cache_salt: str | None = None


@dataclass
class Driven:
    """What came of the requests, by name.

    Attributes:
        token_ids: generated.
        kept: (high, low) tokens over all layers and heads, after the last step in which it ran.
        num_cached: tokens of its prompt that were found in the cache.
        finish_reason: why it ended.
        running_peak: requests at once.
    """

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_cached: dict[str, int] = field(default_factory=dict)
    finish_reason: dict[str, str | None] = field(default_factory=dict)
    running_peak: int = 0


def shipped_prompts() -> list[str]:
    lines = (Path(MODEL).parent / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def manager(llm: Any) -> Any:
    from diffkv.vllm_plugin.scheduler.manager import DiffKVManager

    managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    (ours,) = (each for each in managers if isinstance(each, DiffKVManager))
    return ours


def worker() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker


def usable_blocks(llm: Any) -> int:
    """Blocks that requests can have: all but the null block and the tables' share."""
    return manager(llm).block_pool.num_gpu_blocks - 1


def blocks_in_use(llm: Any) -> int:
    return usable_blocks(llm) - manager(llm).block_pool.get_num_free_blocks()


def outside_name(request_id: str) -> str:
    """The name that a request was added under: vLLM appends a dash and random characters."""
    return request_id.rsplit("-", 1)[0]


def add(llm: Any, name: str, request: Request) -> None:
    from vllm import SamplingParams

    prompt: Any = request.prompt
    if not isinstance(prompt, str):
        prompt = {"prompt_token_ids": prompt}
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
    llm.llm_engine.add_request(
        name,
        prompt,
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
            driven.num_cached[output.request_id] = output.num_cached_tokens
            driven.finish_reason[output.request_id] = output.outputs[0].finish_reason
        driven.running_peak = max(driven.running_peak, len(scheduler(llm).running))
        if ours:
            for request_id, request in worker().requests.items():
                high, low = worker().state.num_tokens[request.rows].sum((0, 1, 2)).tolist()
                driven.kept[outside_name(request_id)] = (high, low)
        if after_step is not None:
            after_step(step)
    llm.llm_engine.step()
    return driven


def check_idle(llm: Any) -> None:
    """No request: all rows are idle, no block is in use, and vLLM's gauge says so."""
    ours, state, rows = manager(llm), worker().state, worker()._rows
    pool.check_invariants(state)
    ours.store.check()
    assert not worker().requests
    assert int((rows.of_block >= 0).sum()) == 0
    assert set(rows.lengths) == set(ours.store._rows) == set(ours.store._idle)
    held = int(state.num_pages_held[list(rows.lengths)].sum())
    assert worker().accounts.num_held == held == int(worker().accounts._kept[0])
    assert rows.num_tokens == sum(rows.lengths.values())
    assert blocks_in_use(llm) == 0
    assert scheduler(llm).kv_cache_manager.usage == 0
    assert not any(
        (ours.req_to_blocks, ours._running, ours._requests, ours._hits._of_hashes, ours._hits._ends)
    )
    assert not scheduler(llm).connector.scheduler._thresholds


def check_empty(llm: Any) -> None:
    """Like `check_idle`; and once rows that are kept are given up, no page is held."""
    check_idle(llm)
    assert llm.reset_prefix_cache()
    drive(llm, {"last": Request([1, 2, 3], 1)})  # its message has the workers release them
    check_idle(llm)
    manager(llm).store.clear()
    llm.llm_engine.engine_core.engine_core.scheduler.finished_req_ids.add("nobody")
    llm.llm_engine.step()
    assert worker().accounts.num_held == 0
    assert not worker()._rows.lengths


def check_quotas(llm: Any) -> None:
    """Blocks cover the pages of open rows and of rows in use, and the gauge is that of blocks in use."""
    ours, state = manager(llm), worker().state
    running = ours._running
    waiting = [
        request.slot
        for request in worker().requests.values()
        if request.start < request.num_tokens < request.ends.prompt_len
    ]
    pool.check_invariants(state, waiting)
    ours.store.check()
    layers, used = worker().shape.num_layers, 0
    for request in scheduler(llm).running:
        each = running[request.request_id]
        used += len(each.blocks)
        assert len(each.blocks) * layers >= int(state.num_pages_held[each.slot].sum())
    idle = 0
    for row in ours.store._rows.values():
        assert len(row.blocks) * layers >= int(state.num_pages_held[row.slot].sum())
        used += len(row.blocks) if row.users else 0
        idle += 0 if row.users else len(row.blocks)
    assert used == blocks_in_use(llm)
    assert idle <= ours.block_pool.get_num_free_blocks()
    if ours.block_pool is not scheduler(llm).kv_cache_manager.block_pool:
        return  # the gauge is of the blocks of other layers
    usage = scheduler(llm).kv_cache_manager.usage
    assert usage == 1 - (usable_blocks(llm) - used) / usable_blocks(llm)
