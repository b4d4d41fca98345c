"""Prefix caching: the closed rows that hold a waiting request's first tokens."""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from typing import Any

from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

from diffkv.policy import Thresholds
from diffkv.segments import RowEnds, first_message
from diffkv.shape import PoolShape
from diffkv.vllm_plugin.scheduler.rows import Prefix, Row, RowStore
from diffkv.vllm_plugin.scheduler.running import Running

__all__ = ["Hits", "message_ends"]


class Hits:
    """Finds rows for requests. vLLM names a request by its list of hashes, which is the same always.

    Args:
        store: the closed rows.
        shape: the pool's.
        num_blocks: blocks that requests and rows can have.
        block_size: tokens of a hashed block.
        message_ends: tokens that end a message in the model's chats.
        read: a request's thresholds.
    """

    def __init__(
        self,
        store: RowStore,
        shape: PoolShape,
        num_blocks: int,
        block_size: int,
        message_ends: Collection[int],
        read: Callable[[Any], Thresholds],
    ) -> None:
        self._store = store
        self._segment = shape.segment
        self._message_ends = message_ends
        self._most_rows = min(shape.chain_width, shape.num_slots - 1)
        self._most_blocks = num_blocks - 1
        self._block_size = block_size
        self._read = read
        self._of_hashes: dict[int, Any] = {}
        self._found: dict[str, list[Row]] = {}
        self._ends: dict[str, RowEnds] = {}

    def know(self, request: Any) -> None:
        """A request arrives."""
        self._of_hashes[id(request.block_hashes)] = request

    def forget(self, request: Any) -> None:
        """A request ended."""
        self._of_hashes.pop(id(request.block_hashes), None)
        self._found.pop(request.request_id, None)
        self._ends.pop(request.request_id, None)

    def ends(self, request: Any) -> RowEnds:
        """Where the closed rows of a request end, all tokens that it has being its prompt."""
        name, length = request.request_id, request.num_tokens
        ends = self._ends.get(name)
        if ends is None or ends.prompt_len != length:
            tokens = request.all_token_ids
            message = first_message(tokens, self._message_ends, self._segment)
            drops = self._read(request).drops
            ends = self._ends[name] = RowEnds(self._segment, length, message, drops)
        return ends

    def prefix(self, request: Any, thresholds: Thresholds) -> Prefix:
        """The tokens of a request, as rows are found by them."""

        def extra_keys(start: int, end: int) -> Any:
            return generate_block_hash_extra_keys(request, start, end, 0)[0]

        hashes, tokens = request.block_hashes, request.all_token_ids
        return Prefix(hashes, tokens, thresholds, self._block_size, extra_keys)

    def look_up(self, block_hashes: Any, max_tokens: int) -> int:
        """Tokens of a request that rows hold, at most `max_tokens`.

        Its chain has room for the rows that the rest of its prompt will be, and leaves a slot and a
        block for the request itself.
        """
        request = self._of_hashes.get(id(block_hashes))
        if request is None or not self._store.keeps:
            return 0

        ends = self.ends(request)

        def fits(rows: Sequence[Row]) -> bool:
            more = len(ends.up_to(rows[-1].end, ends.prompt_len))
            num_blocks = sum(len(row.blocks) for row in rows)
            return len(rows) + more <= self._most_rows and num_blocks <= self._most_blocks

        prefix = self.prefix(request, self._read(request))
        found = self._store.find(prefix, max_tokens, fits)
        self._found[request.request_id] = found
        return found[-1].end if found else 0

    def found(self, request_id: str) -> list[Row]:
        """The rows of the latest look-up for a request."""
        return self._found.get(request_id, [])

    def take(self, request_id: str) -> list[Row]:
        """The same, as the request starts: it will be looked up again if it is preempted."""
        return self._found.pop(request_id, [])

    def is_coming(self, request: Any, running: Iterable[Running]) -> bool:
        """Whether one of some running requests is about to compute the next row of one that waits.

        A request waits only for one that runs, so none waits for ever.
        """
        found = self._found.get(request.request_id)
        if found is None:
            return False
        end = found[-1].end if found else 0
        prefix = self.prefix(request, self._read(request))
        for other in running:
            row_end = self._next_end(other, end)
            if row_end is not None and row_end < request.num_tokens:
                key = prefix.key(row_end)
                if key and key == self.prefix(other.request, other.thresholds).key(row_end):
                    return True
        return False

    def _next_end(self, running: Running, end: int) -> int | None:
        """End of the first row after `end` that a request will close, or does in this step.

        None if there is none, if others would not find it, or if the request is not as far as that.
        """
        rows = running.chain
        if running.failed or end > running.num_tokens:
            return None
        if rows and not self._store.is_found(rows[-1]):
            return None
        row_end = running.ends.after(rows[-1].end if rows else 0)
        while row_end is not None and row_end <= end:
            row_end = running.ends.after(row_end)
        return row_end


def message_ends(model_config: Any) -> frozenset[int]:
    """Tokens that end a message in a model's chats: those that end its answers.

    With most chat templates they end the system's and the user's messages too.
    """
    known = [getattr(model_config.hf_text_config, "eos_token_id", None)]
    known.append(model_config.try_get_generation_config().get("eos_token_id"))
    each = (tokens if isinstance(tokens, list) else [tokens] for tokens in known)
    return frozenset(chain.from_iterable(each)) - {None}
