"""The rows that are closed: who uses them, where they are found, and which are given up first.

They stand in a tree: below a row are those that went on from it. A row that nobody uses is *idle*. Its
blocks are then free, as those of vLLM's own prefix cache are, and it stays findable until one of them is
handed out. No row is used by more requests than the one above it, and rows of one request become idle
from the last to the first, so whatever is given up by least recent use has nothing below it.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from diffkv.policy import Thresholds

__all__ = ["Blocks", "Prefix", "Row", "RowStore"]


class Blocks(Protocol):
    """What rows need of vLLM's `BlockPool`."""

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """Put blocks first in the queue of free ones."""

    def unpin_blocks(self, blocks: Iterable[Any], on_reuse: Callable[[Any], None]) -> None:
        """Put blocks last in that queue, and call `on_reuse` with each when it is handed out."""

    def touch(self, blocks: Sequence[Any]) -> None:
        """Take blocks out of that queue again."""


@dataclass(frozen=True)
class Prefix:
    """The tokens of a request, as rows are found by them.

    Attributes:
        hashes: vLLM's hash of each full block, over all tokens up to its end; LoRA, images and the salt
            of the request are in it.
        tokens: the tokens' ids.
        thresholds: the request's.
        block_size: tokens of a hashed block.
        extra_keys: what vLLM would hash with tokens that are in no full block (LoRA, images, the salt),
            by the first of them and their end.
    """

    hashes: Sequence[bytes]
    tokens: Sequence[int]
    thresholds: Thresholds
    block_size: int
    extra_keys: Callable[[int, int], Hashable]

    def stem(self, num_blocks: int) -> "Stem":
        """What names the tokens of the first full blocks."""
        return self.hashes[num_blocks - 1] if num_blocks else b"", self.thresholds

    def key(self, end: int) -> "Key | None":
        """What names the tokens up to `end`; None if they are not known yet, so that no row is kept."""
        num_blocks = end // self.block_size
        start = num_blocks * self.block_size
        if num_blocks > len(self.hashes) or end > len(self.tokens):
            return None
        extra = self.extra_keys(start, end) if start < end else None
        return self.stem(num_blocks), (tuple(self.tokens[start:end]), extra)


Stem = tuple[bytes, Thresholds]
Tail = tuple[tuple[int, ...], Hashable]
Key = tuple[Stem, Tail]


@dataclass(eq=False)
class Row:
    """A closed row.

    Attributes:
        slot: where its tables are, on every rank.
        start: first token.
        end: end of its tokens.
        thresholds: those by which they were decided.
        blocks: vLLM's blocks that pay for its pages.
        maker: request that computed it, and the number of that request's admission; None once its pages
            were reported.
        parent: the row before it in the tree; None if the row is not findable.
        key: its name below its parent.
        users: running requests in whose chain it is.
        children: rows below it, by the last full block and thresholds, then by the tokens after that.
        longest: tokens of the longest of them that there ever was.
    """

    slot: int
    start: int
    end: int
    thresholds: Thresholds
    blocks: list[Any] = field(default_factory=list)
    maker: tuple[str, int] | None = None
    parent: "Row | None" = None
    key: Key | None = None
    users: int = 0
    children: dict[Stem, dict[Tail, "Row"]] = field(default_factory=dict)
    longest: int = 0

    def below(self) -> list["Row"]:
        """The rows that go on from this one."""
        return [row for rows in self.children.values() for row in rows.values()]


class RowStore:
    """Slots, and the closed rows in them.

    Args:
        num_slots: slots of the pool.
        blocks: vLLM's pool of blocks.
        keeps: whether rows are kept for other requests.

    Attributes:
        keeps: likewise.
        num_resets: how often rows were cleared.
    """

    def __init__(self, num_slots: int, blocks: Blocks, keeps: bool) -> None:
        self._blocks = blocks
        self.keeps = keeps
        self.num_resets = 0
        self._root = Row(-1, 0, 0, Thresholds())
        self._free_slots = list(range(num_slots))[::-1]
        self._rows: dict[int, Row] = {}
        self._idle: OrderedDict[int, Row] = OrderedDict()
        self._released: dict[int, None] = {}
        self._ended: dict[str, Row] = {}

    # slots

    @property
    def num_takeable(self) -> int:
        """Slots that can be taken now: free ones and those of idle rows."""
        return len(self._free_slots) + len(self._idle)

    def take_slot(self) -> int:
        """A slot for a row; the row that was idle longest is given up if none is free."""
        if not self._free_slots:
            self.give_up(next(iter(self._idle.values())))
        return self._free_slots.pop()

    def release_slot(self, slot: int) -> None:
        """The row in a slot is gone: the workers hear of it in the next message."""
        self._free_slots.append(slot)
        self._released[slot] = None

    def take_released(self) -> list[int]:
        """Slots whose rows are gone since this was last asked."""
        released, self._released = self._released, {}
        return list(released)

    # the tree

    def find(
        self, prefix: Prefix, max_tokens: int, fits: Callable[[Sequence[Row]], bool]
    ) -> list[Row]:
        """The chain of rows that holds most of a request's first tokens.

        Args:
            prefix: the request's tokens.
            max_tokens: most tokens to be found.
            fits: asked with a chain, whether it will do.

        Returns:
            Rows, first tokens first; of several chains with as many tokens the one with fewest rows.
        """
        best: list[Row] = []
        paths: list[list[Row]] = [[]]
        while paths:
            path = paths.pop()
            node = path[-1] if path else self._root
            for row in self._matching(node, prefix, max_tokens):
                chain = [*path, row]
                paths.append(chain)
                longer = not best or (row.end, -len(chain)) > (best[-1].end, -len(best))
                if longer and fits(chain):
                    best = chain
        return best

    @staticmethod
    def _matching(node: Row, prefix: Prefix, max_tokens: int) -> list[Row]:
        found: list[Row] = []
        if not node.children:
            return found
        size, most = prefix.block_size, min(max_tokens, node.end + node.longest)
        for number in range(node.end // size, min(most // size, len(prefix.hashes)) + 1):
            rows = node.children.get(prefix.stem(number), {})
            first = number * size
            # Below no block there may be a row for every short prompt
            ends = (
                range(first, first + size) if len(rows) > size else {r.end for r in rows.values()}
            )
            for end in ends:
                key = prefix.key(end) if end <= max_tokens else None
                if key and key[1] in rows:
                    found.append(rows[key[1]])
        return found

    def at(self, slot: int) -> Row | None:
        """The closed row in a slot."""
        return self._rows.get(slot)

    def last_of(self, request_id: str) -> Row | None:
        """The row that an ended request left, if a report of its pages is to come."""
        return self._ended.get(request_id)

    def is_found(self, row: Row) -> bool:
        """Whether other requests may find it."""
        return row.parent is not None

    def add(self, row: Row, chain: Sequence[Row], prefix: Prefix | None) -> None:
        """A row is closed at the end of a chain, and its maker uses it.

        It is findable if its tokens have a name, all rows before it are, and there is no such row yet.
        """
        self._rows[row.slot] = row
        row.users = 1
        parent = chain[-1] if chain else self._root
        key = prefix.key(row.end) if prefix is not None else None
        if not self.keeps or key is None or not (parent is self._root or self.is_found(parent)):
            return
        rows = parent.children.setdefault(key[0], {})
        if rows.setdefault(key[1], row) is row:
            row.parent, row.key = parent, key
            parent.longest = max(parent.longest, row.end - parent.end)

    def withdraw(self, row: Row) -> None:
        """A row is not closed after all: its step does not come, and no worker has heard of it.

        Only a request that runs is preempted before its step, and vLLM has none start before that is
        settled, so nobody has found the row.
        """
        assert row.users == 1 and not row.children, "a row that is not closed is used"
        if self.is_found(row):
            self._unlink(row)
        del self._rows[row.slot]
        self._free_slots.append(row.slot)

    def use(self, rows: Iterable[Row]) -> None:
        """A request starts with some rows in its chain."""
        for row in rows:
            if self._idle.pop(row.slot, None) is not None:
                self._blocks.touch(row.blocks)
            row.users += 1

    def leave(self, chain: Sequence[Row]) -> None:
        """A request ends or is preempted: the rows of its chain that nobody else uses become idle."""
        for row in reversed(chain):
            row.users -= 1
            if row.users:
                continue
            if self.is_found(row):
                self._idle[row.slot] = row
                self._blocks.unpin_blocks(row.blocks, partial(self._on_reuse, row))
            else:
                self._drop(row)
                self._blocks.free_blocks(row.blocks)

    def awaits_report(self, row: Row) -> None:
        """The maker of a row has ended, and will report its pages as those of its open row."""
        assert row.maker is not None, "its pages are known"
        self._ended[row.maker[0]] = row

    def settle(self, row: Row, num_blocks: int) -> None:
        """The pages of a row are known: give back the blocks that it does not need."""
        self._forget_maker(row)
        surplus = row.blocks[num_blocks:]
        del row.blocks[num_blocks:]
        if row.users:
            self._blocks.free_blocks(surplus)
        # those of an idle row are free already

    # giving up

    def _on_reuse(self, row: Row, block: Any) -> None:
        """A block is handed out, or vLLM's prefix cache is reset. It may not be the row's any more."""
        if row.slot in self._idle and self._idle[row.slot] is row and block in row.blocks:
            self.give_up(row)

    def give_up(self, row: Row) -> None:
        """Have an idle row, and all below it, found no more. Their blocks are free already."""
        subtree = [row]
        for node in subtree:
            subtree.extend(node.below())
        for node in reversed(subtree):
            assert not node.users, f"{node.users} requests use a row that is given up"
            del self._idle[node.slot]
            self._unlink(node)
            self._drop(node)

    def clear(self) -> None:
        """Give up all idle rows, and have those that are used found by nobody else."""
        self.num_resets += 1
        for row in list(self._idle.values()):
            if row.slot in self._idle:
                self.give_up(row)
        for row in self._rows.values():
            if self.is_found(row):
                self._unlink(row)

    def _unlink(self, row: Row) -> None:
        assert row.parent is not None and row.key is not None, "not in the tree"
        rows = row.parent.children[row.key[0]]
        del rows[row.key[1]]
        if not rows:
            del row.parent.children[row.key[0]]
        row.parent = row.key = None

    def _drop(self, row: Row) -> None:
        del self._rows[row.slot]
        self._forget_maker(row)
        self.release_slot(row.slot)

    def _forget_maker(self, row: Row) -> None:
        if row.maker is not None and self._ended.get(row.maker[0]) is row:
            del self._ended[row.maker[0]]
        row.maker = None

    def check(self) -> None:
        """Raise AssertionError if slots or uses do not add up."""
        slots = [*self._free_slots, *self._rows]
        assert len(slots) == len(set(slots)), f"a slot is there twice: {sorted(slots)}"
        for slot, row in self._rows.items():
            assert row.slot == slot and (slot in self._idle) == (row.users == 0), row
            for child in row.below():
                assert child.parent is row and child.start == row.end
                assert child.users <= row.users, "a row is used, and the one before it is not"
        order = list(self._idle)
        for position, slot in enumerate(order):
            for child in self._idle[slot].below():
                assert order.index(child.slot) < position, "a row would go before those below it"
