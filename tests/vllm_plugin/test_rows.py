"""The tree of closed rows: what is found, what is shared, and what goes first."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest

from diffkv.policy import Thresholds
from diffkv.vllm_plugin.scheduler.rows import Prefix, Row, RowStore

BLOCK = 16
DEFAULT, OTHER = Thresholds(3, 0.3), Thresholds(5, 0)


class Pool:
    """A pool of blocks that only notes what is asked of it."""

    def __init__(self) -> None:
        self.free: list[Any] = []
        self.watchers: dict[Any, Callable[[Any], None]] = {}

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        self.free[:0] = ordered_blocks

    def unpin_blocks(self, blocks: Iterable[Any], on_reuse: Callable[[Any], None]) -> None:
        for block in blocks:
            self.free.append(block)
            self.watchers[block] = on_reuse

    def touch(self, blocks: Sequence[Any]) -> None:
        for block in blocks:
            self.free.remove(block)

    def take(self) -> Any:
        block = self.free.pop(0)
        if block in self.watchers:
            self.watchers.pop(block)(block)
        return block


def prefix(
    tokens: list[int],
    thresholds: Thresholds = DEFAULT,
    salt: str = "",
    images: tuple[tuple[int, str], ...] = (),
) -> Prefix:
    """With hashes of all tokens so far, as vLLM's are, and the images that begin at some of them."""

    def extra_keys(start: int, end: int) -> Hashable:
        shown = [(at, image) for at, image in images if start <= at < end]
        return (salt if start == 0 else "", *shown)

    blocks = [
        (tokens[i : i + BLOCK], extra_keys(i, i + BLOCK)) for i in range(0, len(tokens), BLOCK)
    ]
    hashes = [repr(blocks[: i + 1]).encode() for i in range(len(tokens) // BLOCK)]
    return Prefix(hashes, tokens, thresholds, BLOCK, extra_keys)


def always(chain: Sequence[Row]) -> bool:
    return True


class Chain:
    """Closes rows of one request in a store."""

    def __init__(
        self, store: RowStore, tokens: list[int], thresholds: Thresholds = DEFAULT
    ) -> None:
        self.store, self.tokens, self.thresholds = store, tokens, thresholds
        self.rows: list[Row] = []

    def go_on(self, rows: list[Row]) -> "Chain":
        self.store.use(rows)
        self.rows = list(rows)
        return self

    def close(self, *ends: int) -> "Chain":
        for end in ends:
            start = self.rows[-1].end if self.rows else 0
            slot = self.store.take_slot()
            blocks = [f"{slot}-{i}" for i in range(2)]
            row = Row(slot, start, end, self.thresholds, blocks, ("r", 1))
            self.store.add(row, self.rows, prefix(self.tokens, self.thresholds))
            self.rows.append(row)
        return self

    def leave(self) -> None:
        self.store.leave(self.rows)
        self.store.check()


TOKENS = list(range(1, 201))


@pytest.fixture
def blocks() -> Pool:
    return Pool()


@pytest.fixture
def store(blocks: Pool) -> RowStore:
    return RowStore(8, blocks, keeps=True)


def ends(rows: list[Row]) -> list[int]:
    return [row.end for row in rows]


class TestTree:
    def test_the_longest_chain_of_several_branches_is_found(self, store: RowStore) -> None:
        one = Chain(store, TOKENS).close(64, 128)
        branch = Chain(store, TOKENS[:100] + [7] * 100)
        branch.go_on(one.rows[:1]).close(110)
        Chain(store, TOKENS).close(70, 135)
        assert ends(store.find(prefix(TOKENS), 199, always)) == [70, 135]
        assert store.find(prefix(TOKENS), 134, always) == one.rows
        assert ends(store.find(prefix(TOKENS), 127, always)) == [70]
        assert ends(store.find(prefix(TOKENS[:100] + [7] * 50), 149, always)) == [64, 110]
        assert ends(store.find(prefix(TOKENS[:100] + [8] * 50), 149, always)) == [70]
        assert store.find(prefix(TOKENS[:50]), 49, always) == []
        assert store.find(prefix([9, *TOKENS]), 150, always) == []

    def test_tokens_after_the_last_hashed_ones_count(self, store: RowStore) -> None:
        Chain(store, TOKENS).close(70)
        assert ends(store.find(prefix(TOKENS[:71]), 70, always)) == [70]
        assert store.find(prefix([*TOKENS[:69], 0, 0]), 70, always) == []

    def test_thresholds_and_salt_are_part_of_the_name(self, store: RowStore) -> None:
        Chain(store, TOKENS).close(64)
        Chain(store, TOKENS, OTHER).close(64, 128)
        assert ends(store.find(prefix(TOKENS), 199, always)) == [64]
        assert ends(store.find(prefix(TOKENS, OTHER), 199, always)) == [64, 128]
        assert store.find(prefix(TOKENS, salt="a"), 199, always) == []

    def test_a_chain_that_is_too_long_for_the_rest_is_not_taken(self, store: RowStore) -> None:
        Chain(store, TOKENS).close(64, 80, 96, 112)
        found = store.find(prefix(TOKENS), 199, lambda chain: len(chain) <= 2)
        assert ends(found) == [64, 80]

    def test_rows_whose_tokens_are_not_known_are_not_kept(
        self, store: RowStore, blocks: Pool
    ) -> None:
        ahead = Chain(store, TOKENS).close(len(TOKENS) + 1)
        assert not store.is_found(ahead.rows[0])
        ahead.leave()
        assert len(blocks.free) == 2 and not blocks.watchers
        assert store.take_released() == [ahead.rows[0].slot]

    def test_rows_shorter_than_a_hashed_block_are_found(self, store: RowStore) -> None:
        Chain(store, TOKENS).close(5, 11, 64)
        assert ends(store.find(prefix(TOKENS), 199, always)) == [5, 11, 64]
        assert ends(store.find(prefix(TOKENS[:12]), 11, always)) == [5, 11]
        assert store.find(prefix(TOKENS, OTHER), 199, always) == []
        assert store.find(prefix(TOKENS, salt="a"), 199, always) == []
        assert store.find(prefix([9, *TOKENS]), 199, always) == []

    def test_among_many_short_rows(self) -> None:
        store = RowStore(10 * BLOCK, Pool(), keeps=True)
        for number in range(5 * BLOCK):
            Chain(store, [1000 + number, *TOKENS]).close(3 + number % 5)
        for number in (0, 7, 5 * BLOCK - 1):
            tokens = [1000 + number, *TOKENS]
            assert ends(store.find(prefix(tokens), 199, always)) == [3 + number % 5]
            assert store.find(prefix(tokens), 2, always) == []
        assert store.find(prefix(TOKENS), 199, always) == []

    def test_images_are_part_of_the_name_wherever_a_row_ends(self, store: RowStore) -> None:
        cat, dog = ((4, "cat"), (66, "cat")), ((4, "cat"), (66, "dog"))
        rows = [Row(store.take_slot(), 0, 6, DEFAULT), Row(store.take_slot(), 6, 70, DEFAULT)]
        for number, row in enumerate(rows):
            store.add(row, rows[:number], prefix(TOKENS, images=cat))
        assert ends(store.find(prefix(TOKENS, images=cat), 199, always)) == [6, 70]
        assert ends(store.find(prefix(TOKENS, images=dog), 199, always)) == [6]
        assert store.find(prefix(TOKENS), 199, always) == []

    def test_of_two_rows_with_the_same_tokens_the_older_is_kept(self, store: RowStore) -> None:
        one, two = Chain(store, TOKENS).close(64), Chain(store, TOKENS).close(64, 128)
        assert store.find(prefix(TOKENS), 199, always) == one.rows
        assert not any(map(store.is_found, two.rows))
        two.leave()
        assert store.take_released() == [row.slot for row in reversed(two.rows)]
        one.leave()
        assert store.take_released() == []

    def test_without_prefix_caching_nothing_is_kept(self, blocks: Pool) -> None:
        store = RowStore(4, blocks, keeps=False)
        chain = Chain(store, TOKENS).close(64, 128)
        assert store.find(prefix(TOKENS), 199, always) == []
        chain.leave()
        assert store.num_takeable == 4 and len(blocks.free) == 4


class TestIdleRows:
    def test_the_one_unused_longest_goes_first_and_children_before_parents(
        self, store: RowStore, blocks: Pool
    ) -> None:
        old = Chain(store, TOKENS).close(64, 128)
        new = Chain(store, [5] * 200).close(64)
        old.leave()
        new.leave()
        slots = [old.rows[1].slot, old.rows[0].slot, new.rows[0].slot]
        for slot in slots:
            blocks.take()
            assert store.take_released() == [slot]
            blocks.take()  # the other block of a row that is gone
            assert store.take_released() == []
        assert not blocks.free and store.find(prefix(TOKENS), 199, always) == []

    def test_a_hit_takes_its_blocks_and_makes_it_the_latest(
        self, store: RowStore, blocks: Pool
    ) -> None:
        one, two = Chain(store, TOKENS).close(64), Chain(store, [5] * 200).close(64)
        one.leave()
        two.leave()
        store.use(one.rows)
        assert blocks.free == two.rows[0].blocks
        store.leave(one.rows)
        blocks.take()
        assert store.find(prefix([5] * 200), 199, always) == []
        assert store.find(prefix(TOKENS), 199, always) == one.rows

    def test_rows_that_are_used_are_never_given_up(self, store: RowStore, blocks: Pool) -> None:
        one = Chain(store, TOKENS).close(64)
        store.use(one.rows)
        one.leave()
        assert not blocks.free and store.num_takeable == 7
        store.clear()  # a reset while it is used: nobody else finds it, and it goes with its user
        assert store.find(prefix(TOKENS), 199, always) == []
        assert store.take_released() == []
        one.leave()
        assert store.take_released() == [one.rows[0].slot]

    def test_slots_run_out_before_blocks_do(self, store: RowStore) -> None:
        Chain(store, TOKENS).close(64, 128).leave()
        used = [store.take_slot() for _ in range(6)]
        assert store.take_released() == [] and store.num_takeable == 2
        used.append(store.take_slot())
        assert store.take_released() == used[-1:]
        assert ends(store.find(prefix(TOKENS), 199, always)) == [64]

    def test_blocks_that_a_report_shows_to_be_too_many_go_back(
        self, store: RowStore, blocks: Pool
    ) -> None:
        used, idle = Chain(store, TOKENS).close(64), Chain(store, [5] * 200).close(64)
        store.settle(used.rows[0], 1)
        assert len(blocks.free) == 1 and used.rows[0].maker is None
        idle.leave()
        store.settle(idle.rows[0], 1)
        store.use(idle.rows)
        assert len(blocks.free) == 2
        for _ in range(2):  # one of them was the idle row's, and means nothing to it any more
            blocks.take()
        assert ends(store.find(prefix([5] * 200), 199, always)) == [64]
