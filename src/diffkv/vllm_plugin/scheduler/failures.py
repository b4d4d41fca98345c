"""Requests that are too large for the whole pool: the workers have vLLM end them."""

from typing import Any, NamedTuple

from vllm.logger import init_logger

from diffkv.vllm_plugin.messages import MAX_IN_FLIGHT, PagesHeld
from diffkv.vllm_plugin.scheduler.running import Running

__all__ = ["Failures"]

logger = init_logger("vllm.diffkv")


class _Kept(NamedTuple):
    """A block: the last step that names it, and the message by which that has come back."""

    block: Any
    num_tokens: int
    due: int


class Failures:
    """Their names, and the blocks that were the identities of those that left.

    Such a block is named as a load error by every step of its request, also by one in flight when the
    request leaves. vLLM would end whoever had been given it in the meantime.

    Args:
        block_pool: vLLM's pool of blocks.

    Attributes:
        names: running requests.
    """

    def __init__(self, block_pool: Any) -> None:
        self.names: set[str] = set()
        self._block_pool = block_pool
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._num_messages = 0

    @property
    def num_kept(self) -> int:
        """Blocks that are kept."""
        return len(self._kept)

    def add(self, running: Running, num_tokens: int, num_pages: int) -> None:
        """Let a request's step of so many tokens pass without blocks."""
        running.failed = True
        self.names.add(running.request.request_id)
        logger.error(
            f"Request {running.request.request_id} ends with an error: {num_tokens} tokens of it may "
            f"need more than the {num_pages} pages of DiffKV's whole pool. Give the engine more KV "
            f"memory, or send shorter prompts"
        )

    def leave(self, running: Running) -> None:
        """A request leaves: of one that failed, the first block is kept."""
        name = running.request.request_id
        self.names.discard(name)
        if running.failed:
            due = self._num_messages + MAX_IN_FLIGHT
            self._kept[name, running.epoch] = _Kept(running.blocks.pop(0), running.num_tokens, due)

    def on_message(self) -> None:
        """A step is scheduled: those that were so many steps ago have come back."""
        self._num_messages += 1
        for key in [key for key, kept in self._kept.items() if kept.due <= self._num_messages]:
            self._free(key)

    def on_report(self, name: str, report: PagesHeld) -> None:
        """A step of a request has come back."""
        kept = self._kept.get((name, report.epoch))
        if kept is not None and report.num_tokens >= kept.num_tokens:
            self._free((name, report.epoch))

    def _free(self, key: tuple[str, int]) -> None:
        self._block_pool.free_blocks([self._kept.pop(key).block])
