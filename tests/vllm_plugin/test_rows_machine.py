"""Rows against an adversary: turns, branches, salts, thresholds, aborts, resets, a pool that is full."""

from typing import Any

import numpy as np
import pytest
from rows_world import MODEL_LEN, World
from vllm.v1.request import RequestStatus

OPERATIONS = 20000

EXTRA_ARGS: list[dict[str, Any] | None] = [
    None,
    None,
    None,
    {"diffkv": "off"},
    {"diffkv_alpha_high": 5},
    {"diffkv_alpha_low": 0.5},
]


class Clients:
    """Send whatever may be hard on a cache of rows."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self.world = world
        self.rng = rng
        self.documents = [rng.integers(10, 90, MODEL_LEN).tolist() for _ in range(6)]
        self.num_aborted = 0

    def tokens(self) -> list[int]:
        """A prompt: a shared beginning and an end of its own, or what goes on from an earlier one."""
        rng, ended = self.rng, self.world.ended_tokens
        longest = MODEL_LEN - 121
        if ended and rng.random() < 0.5:
            tokens = list(ended[-1 - int(rng.integers(min(20, len(ended))))])
            if rng.random() < 0.3:  # re-tokenised, or a stop string that the client never saw
                tokens = tokens[: int(rng.integers(1, len(tokens) + 1))]
            tokens += rng.integers(10, 90, int(rng.integers(1, 40))).tolist()
            if len(tokens) <= longest:
                return tokens
        document = self.documents[int(rng.integers(len(self.documents)))]
        shared = document[: int(rng.integers(0, 300))]
        return shared + rng.integers(10, 90, int(rng.integers(1, 60))).tolist()

    def send(self) -> None:
        rng = self.rng
        settings: dict[str, Any] = {
            "salt": [None, None, None, "a"][int(rng.integers(4))],
            "extra_args": EXTRA_ARGS[int(rng.integers(len(EXTRA_ARGS)))],
            "stop_token_ids": [[], [2]][int(rng.integers(2))],
            "priority": int(rng.integers(3)),
            "skip_reading_prefix_cache": bool(rng.random() < 0.05),
        }
        tokens, num = self.tokens(), 1 if rng.random() < 0.8 else 3
        for _ in range(num):  # several answers to one prompt come together
            self.world.add(list(tokens), int(rng.integers(1, 120)), **settings)

    def operate(self) -> None:
        world, dice = self.world, self.rng.random()
        requests = world.scheduler.requests
        if dice < 0.12 and len(requests) < 24:
            self.send()
        elif dice < 0.14 and requests:
            name = list(requests)[int(self.rng.integers(len(requests)))]
            world.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self.num_aborted += 1
        elif dice < 0.141:
            world.scheduler.reset_prefix_cache()
        elif dice < 0.142:
            world.scheduler.reset_connector_cache()
        elif dice < 0.143:
            assert world.scheduler.reset_prefix_cache(reset_running_requests=True)
        else:
            world.step()
        world.check()


@pytest.mark.parametrize("overlap", [False, True], ids=["one after the other", "overlapping"])
@pytest.mark.parametrize(
    ("num_blocks", "worst", "policy"),
    [(700, 0.1, "fcfs"), (320, 0.8, "fcfs"), (320, 0.8, "priority")],
    ids=["roomy", "tight", "priority"],
)
def test_nothing_leaks_nothing_is_wrong_all_end(
    overlap: bool, num_blocks: int, worst: float, policy: str
) -> None:
    late = overlap and num_blocks < 400
    world = World(1, overlap, num_blocks, worst, late=late, scheduling_policy=policy)
    clients = Clients(world, np.random.default_rng(2))
    for _ in range(OPERATIONS // 6):
        clients.operate()
    world.drain()
    workers, store = world.workers, world.manager.store
    assert world.scheduler.kv_cache_manager.usage == 0
    assert len(world.ends) + clients.num_aborted == world.num_added
    assert not workers.jobs and not world.manager._running
    assert (
        workers.hits > 50
        and workers.in_step > 5
        and workers.rows_closed > 200
        and workers.rows_kept > 50
    )
    assert world.preemptions > (15 if num_blocks < 400 else 5)
    assert set(workers.rows) == set(store._rows) == set(store._idle)
    assert world.scheduler.reset_prefix_cache()
    world.step()
    while world.in_flight:
        world.finish_step()
    assert not workers.rows and not store._rows and not store._ended
    assert len(store._free_slots) == world.manager.shape.num_slots
