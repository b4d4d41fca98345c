"""vLLM's scheduler with layers of two kinds, against the clients of `test_rows_machine`."""

import numpy as np
import pytest
from rows_world import World
from test_rows_machine import Clients

OPERATIONS = 2500


@pytest.mark.parametrize("overlap", [False, True], ids=["one after the other", "overlapping"])
@pytest.mark.parametrize(("num_blocks", "worst"), [(150, 0.1), (100, 0.9)], ids=["roomy", "tight"])
def test_neither_part_runs_out_and_nothing_leaks(
    overlap: bool, num_blocks: int, worst: float
) -> None:
    world = World(3, overlap, num_blocks, worst, windows=4)
    theirs = world.scheduler.kv_cache_manager.block_pool
    assert theirs is not world.manager.block_pool
    assert not world.scheduler.kv_cache_manager.enable_caching
    clients = Clients(world, np.random.default_rng(4))
    for _ in range(OPERATIONS):
        clients.operate()
    world.drain()
    assert len(world.ends) + clients.num_aborted == world.num_added > 100
    assert world.workers.failures == world.workers.hits == 0
    assert world.preemptions > (5 if worst > 0.5 else 0)
    assert not world.workers.jobs and not world.workers.rows
    assert theirs.get_num_free_blocks() == theirs.num_gpu_blocks - 1
    ours = world.manager.block_pool
    assert ours.get_num_free_blocks() == ours.num_gpu_blocks - 1
