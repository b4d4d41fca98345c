"""Prefix caching: the closed rows that hold a waiting request's first tokens."""

from collections.abc import Callable, Iterable
from typing import Any

from diffkv.policy import Thresholds
from diffkv.segments import next_end, row_ends
from diffkv.shape import PoolShape
from diffkv.vllm_plugin.scheduler.rows import Prefix, Row, RowStore
from diffkv.vllm_plugin.scheduler.running import Running

__all__ = ["Hits"]


class Hits:
    """Finds rows for requests. vLLM names a request by its list of hashes, which is the same always.

    Args:
        store: the closed rows.
        shape: the pool's.
        block_size: tokens of a hashed block.
        read: a request's thresholds.
    """

    def __init__(
        self,
        store: RowStore,
        shape: PoolShape,
        block_size: int,
        read: Callable[[Any], Thresholds],
    ) -> None:
        self._store = store
        self._segment = shape.segment
        self._most_rows = min(shape.chain_width, shape.num_slots - 1)
        self._block_size = block_size
        self._read = read
        self._of_hashes: dict[int, Any] = {}
        self._found: dict[str, list[Row]] = {}

    def know(self, request: Any) -> None:
        """A request arrives."""
        self._of_hashes[id(request.block_hashes)] = request

    def forget(self, request: Any) -> None:
        """A request ended."""
        self._of_hashes.pop(id(request.block_hashes), None)
        self._found.pop(request.request_id, None)

    def prefix(self, request: Any, thresholds: Thresholds) -> Prefix:
        """The tokens of a request, as rows are found by them."""
        embedded = bool(request.mm_features) or request.prompt_embeds is not None
        hashes, tokens = request.block_hashes, request.all_token_ids
        return Prefix(hashes, tokens, thresholds, self._block_size, embedded)

    def look_up(self, block_hashes: Any, max_tokens: int) -> int:
        """Tokens of a request that rows hold, at most `max_tokens`.

        Its chain has room for the rows that the rest of its prompt will be.
        """
        request = self._of_hashes.get(id(block_hashes))
        if request is None or not self._store.keeps:
            return 0

        def fits(num_rows: int, end: int) -> bool:
            length = request.num_tokens
            more = len(row_ends(end, length, self._segment, length))
            return num_rows + more <= self._most_rows

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
        chain = running.chain
        if running.failed or end > running.num_tokens:
            return None
        if chain and not self._store.is_found(chain[-1]):
            return None
        sizes = self._segment, running.prompt_len
        row_end = next_end(chain[-1].end if chain else 0, *sizes)
        while row_end is not None and row_end <= end:
            row_end = next_end(row_end, *sizes)
        return row_end
