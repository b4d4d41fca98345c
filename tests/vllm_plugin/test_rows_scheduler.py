"""What a step may need, and rows under vLLM's own scheduler."""

from types import SimpleNamespace
from typing import Any

import pytest
from rows_world import (
    EXACT,
    HEADS,
    LAYERS,
    LAYOUT,
    MAX_RUNNING,
    MESSAGE_END,
    MODEL_LEN,
    SEGMENT,
    World,
)
from vllm.v1.request import RequestStatus

from diffkv.policy import Thresholds
from diffkv.segments import RowEnds
from diffkv.shape import PoolShape
from diffkv.vllm_plugin.messages import PagesHeld
from diffkv.vllm_plugin.scheduler.running import Bounds, Running

DEFAULT = Thresholds(3, 0.3)
SHAPE = PoolShape(LAYOUT, LAYERS, HEADS // LAYERS, 16, MODEL_LEN, 1000, segment=SEGMENT)


def request(num_tokens: int, start: int = 0, computed: int = 0) -> Running:
    return Running(
        SimpleNamespace(), DEFAULT, RowEnds(SEGMENT, num_tokens), 1, 0, [], start, computed
    )


class TestBounds:
    bounds = Bounds(SHAPE)

    def blocks(self, layout: Any, num_tokens: int) -> int:
        return -(-HEADS * layout.max_pages(num_tokens) // LAYERS)

    def test_tokens_wait_as_they_are(self) -> None:
        need = self.bounds.step(request(500), 40)
        assert (need.rows, need.open_blocks) == ((), self.blocks(EXACT, 40))

    def test_a_chunk_completes_several_segments(self) -> None:
        need = self.bounds.step(request(500, 0, 40), 200)
        assert need.rows == ((0, 64), (64, 128), (128, 192))
        assert need.row_blocks == (self.blocks(LAYOUT, 64),) * 3
        assert need.open_blocks == self.blocks(EXACT, 8)

    def test_a_prompt_that_is_computed_is_promised_room_for_its_segment(self) -> None:
        running = request(500, 64, 70)
        running.blocks = [None] * 3
        whole = self.blocks(EXACT, 64)
        assert self.bounds.promised(running) == whole - 3
        running.blocks = [None] * whole
        assert self.bounds.promised(running) == 0
        assert self.bounds.promised(request(500, 448, 500)) == 0

    def held(self, running: Running) -> int:
        return self.bounds.held(running, self.bounds.horizon(running))

    def test_what_waited_is_there_until_it_is_converted(self) -> None:
        """Its pages as the model made them are more than those of the row that it becomes."""
        need = self.bounds.step(request(500, 0, 63), 64)
        before = self.blocks(EXACT, 63)
        assert before > sum(need.row_blocks) == self.blocks(LAYOUT, 64)
        assert need.open_blocks + sum(need.row_blocks) >= before

    def test_the_rest_of_a_prompt_is_decided_with_its_last_chunk(self) -> None:
        need = self.bounds.step(request(150), 150)
        assert need.rows == ((0, 64), (64, 128), (128, 144))
        assert need.row_blocks[2] == self.blocks(LAYOUT, 16)
        assert need.open_blocks == self.blocks(LAYOUT, 6)
        assert self.bounds.step(request(135), 135).open_blocks == self.blocks(LAYOUT, 7)
        assert self.bounds.step(request(128), 128).rows == ((0, 64), (64, 112))
        assert self.bounds.step(request(128), 128).open_blocks == self.blocks(LAYOUT, 16)

    def test_generated_tokens_need_what_the_report_leaves_possible(self) -> None:
        running = request(150, 128, 150)
        assert self.held(running) == self.blocks(LAYOUT, 22)
        running.report = PagesHeld(8, (2, 4), 150)
        assert self.held(running) == 10 // LAYERS  # of the next token, too
        assert self.bounds.step(running, 151).open_blocks == 10 // LAYERS
        assert self.bounds.step(running, 151).rows == ()

    def test_what_a_step_in_flight_may_need_is_kept(self) -> None:
        """A report of the step before it may come while it runs."""
        running = request(500, 64, 70)
        running.in_flight.extend([(64, 20), (70, 8)])
        assert self.held(running) == 20
        running.in_flight.popleft()
        assert self.held(running) == 8 > self.blocks(EXACT, 6)


def fill(world: World) -> None:
    world.drain()
    assert world.scheduler.kv_cache_manager.usage == 0


class TestScheduler:
    """With vLLM's own."""

    def test_a_turn_goes_on_from_the_one_before(self) -> None:
        world = World(0, False, 700)
        world.add(list(range(10, 160)), 20)
        fill(world)
        (tokens,) = world.ended_tokens
        assert (world.queries, world.cached) == (150, 0)
        world.add([*tokens, 5, 6, 7], 4)
        world.step()
        # the last token that was sampled is not stored
        (job,) = world.workers.jobs.values()
        assert job.start.starts[-1] == len(tokens) - 1 == 169
        assert world.manager.store.at(job.start.chain[-1]).start == 144
        assert (world.queries, world.cached) == (150 + 173, 169)
        fill(world)

    def test_a_turn_whose_answer_comes_back_otherwise(self) -> None:
        """All but the last tokens of the prompt are found, whole blocks, as with vLLM's own cache."""
        world = World(0, False, 700)
        prompt = list(range(10, 160))
        world.add(prompt, 20)
        fill(world)
        world.add([*prompt, 5, 6, 7], 4)
        fill(world)
        assert (world.queries, world.cached) == (150 + 153, 144)
        world.add(prompt, 4)
        fill(world)
        assert world.cached == 2 * 144

    def test_chats_over_one_system_message(self) -> None:
        """It ends where no segment does, and the chats find it whole."""
        world = World(0, False, 700)
        system = [*range(10, 110), MESSAGE_END]
        for number in range(3):
            world.add([*system, *range(200 + 50 * number, 240 + 50 * number)], 4)
            fill(world)
            assert world.cached == number * len(system)

    def test_several_answers_compute_a_prompt_once(self) -> None:
        world = World(0, False, 700)
        for _ in range(4):
            world.add(list(range(10, 480)), 10)
        fill(world)
        assert world.workers.hits == 3
        assert world.workers.in_step >= 2, "they start with the step that closes them"
        # the prompt's own rows, and those that the answers left
        assert world.workers.rows_closed == 470 // SEGMENT + 1
        assert world.workers.rows_kept == 4

    def test_a_prompt_of_twice_the_uncompressed_length_is_served(self) -> None:
        world = World(0, False, 480, worst=0.0, model_len=2 * MODEL_LEN)
        uncompressed = HEADS * EXACT.max_pages(2 * MODEL_LEN - 20)
        assert uncompressed > 1.8 * world.workers.num_pages
        world.add(list(range(10, 2 * MODEL_LEN - 10)), 10)
        fill(world)
        assert not world.workers.failures and len(world.ended_tokens) == 1

    @pytest.mark.parametrize("overlap", [False, True])
    def test_what_is_too_large_for_the_whole_pool_ends_alone(self, overlap: bool) -> None:
        world = World(0, overlap, 480, worst=1.0, model_len=2 * MODEL_LEN)
        large = world.add(list(range(10, 2 * MODEL_LEN - 10)), 10, extra_args={"diffkv": "off"})
        small = [world.add(list(range(600, 640 + i)), 10) for i in range(5)]
        fill(world)
        assert world.workers.failures > 0
        assert str(world.ends[large]) == "error"
        assert {str(world.ends[name]) for name in small} == {"length"}
        assert world.preemptions < 5

    def test_a_turn_whose_rows_are_all_blocks_of_the_pool_ends_alone(self) -> None:
        world = World(0, False, 700, worst=1.0, model_len=1536)
        world.add([5 + i % 97 for i in range(1210)], 137, ignore_eos=True)
        fill(world)
        blocks = sum(len(row.blocks) for row in world.manager.store._rows.values())
        assert blocks == world.manager.num_usable, "not the case that this is about"
        (answered,) = world.ended_tokens
        turn = world.add([*answered, 7, 8, 9], 5, ignore_eos=True)
        small = world.add([9] * 20, 5, ignore_eos=True)
        fill(world)
        assert str(world.ends[turn]) == "error"
        assert str(world.ends[small]) == "length"

    @pytest.mark.parametrize("abort", [False, True])
    def test_who_comes_after_one_that_is_too_large_is_not_ended_for_it(self, abort: bool) -> None:
        """A step that names it is in flight when it leaves, and its block would be the next one's."""
        world = World(0, True, 480, worst=1.0, model_len=2 * MODEL_LEN)
        text, num_tokens, failed = list(range(10, 2 * MODEL_LEN)), 64, False
        # a turn that finds all but some tokens, until its first step is too large
        while not failed:
            num_tokens += 32
            turn = world.add(text[:num_tokens], 2, extra_args={"diffkv": "off"})
            while turn in world.scheduler.requests:
                world.step()
                last = world.in_flight[-1][0].kv_connector_metadata if world.in_flight else None
                failed |= last is not None and turn in last.failed
                if failed and abort:
                    world.scheduler.finish_requests(turn, RequestStatus.FINISHED_ABORTED)
                    world.ends.setdefault(turn, "aborted")
        assert any(turn in out.kv_connector_metadata.failed for out, _ in world.in_flight)
        small = world.add(list(range(600, 640)), 10)
        fill(world)
        assert str(world.ends[small]) == "length"

    def test_what_began_before_a_reset_is_not_found_after_it(self) -> None:
        world = World(0, False, 700)
        tokens = list(range(10, 16))
        world.add(tokens, 20)
        for _ in range(10):
            world.step()
        assert world.scheduler.requests
        world.scheduler.reset_connector_cache()
        fill(world)
        (answered,) = world.ended_tokens
        world.add([*answered, 5, 6], 2)
        fill(world)
        assert world.cached == 0

    def test_reset(self) -> None:
        world = World(0, False, 700)
        tokens = list(range(10, 160))
        for reset in (
            world.scheduler.reset_prefix_cache,
            lambda: world.scheduler.reset_prefix_cache(reset_connector=True),
        ):
            world.add(tokens, 5)
            fill(world)
            assert world.manager.store._idle
            assert reset()
            assert not world.manager.store._rows
        assert world.workers.hits == 0

    def test_prefix_caching_off(self) -> None:
        world = World(0, False, 700, enable_prefix_caching=False)
        for _ in range(2):
            world.add(list(range(10, 160)), 5)
            fill(world)
        assert world.workers.hits == 0 and not world.manager.store._rows
        assert world.workers.rows_closed == 6

    def test_slots_are_open_rows_and_closed_ones(self) -> None:
        world = World(0, False, 700)
        assert world.manager.shape.num_slots > MAX_RUNNING
        assert world.manager.shape.segment == SEGMENT


def test_prompts_that_are_computed_together_do_not_preempt_each_other() -> None:
    """Each waits for its segment: who is admitted leaves room for that. Without it there are 14."""
    world = World(3, False, 300, worst=0.5, long_prefill_token_threshold=16)
    for number in range(40):
        world.add([10 + (7 * number + i) % 80 for i in range(180)], 4)
    world.drain(5000)
    assert len(world.ends) == 40
    assert world.preemptions < 5
