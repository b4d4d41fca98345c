"""Which kernels run on a device: chosen once, at start, and logged by whoever chooses."""

from typing import Protocol

from torch import Tensor, dtype

from diffkv.quant import ConfigError
from diffkv.state import DecodePlan, NewTokens, PoolState, PromptTokens

__all__ = ["Ops", "load"]


class Ops(Protocol):
    """The operations; their contracts are in `reference`."""

    def quantize(self, x: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
        """See `reference.quantize`."""
        ...

    def dequantize(self, codes: Tensor, meta: Tensor, bits: int, dtype: dtype) -> Tensor:
        """See `reference.dequantize`."""
        ...

    def rotate(self, x: Tensor, signs: Tensor, inverse: bool, out: Tensor) -> None:
        """See `reference.rotate`."""
        ...

    def significance(
        self,
        query: Tensor,
        key: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        cu_seqlens_own: Tensor,
        num_own: int,
        scale: float,
        max_queries: int,
        lse: Tensor | None = None,
    ) -> Tensor:
        """See `reference.significance`."""
        ...

    def decide_rows(
        self,
        sums: Tensor,
        cu_seqlens: Tensor,
        bounds: Tensor | None,
        page_tokens: Tensor,
        window: int,
        scored_queries: int,
        tiers: Tensor,
    ) -> None:
        """See `reference.decide_rows`."""
        ...

    def centre_rows(
        self, state: PoolState, layer: int, rows: Tensor, cu_seqlens: Tensor, key: Tensor
    ) -> None:
        """See `reference.centre_rows`."""
        ...

    def store_prompt(
        self, state: PoolState, layer: int, tokens: PromptTokens, tiers: Tensor, sums: Tensor
    ) -> None:
        """See `reference.store_prompt`."""
        ...

    def gather(
        self,
        state: PoolState,
        layer: int,
        slots: Tensor,
        starts: Tensor,
        key: Tensor,
        value: Tensor,
        tiers: Tensor,
    ) -> None:
        """See `reference.gather`."""
        ...

    def release(self, state: PoolState, slots: Tensor, layer: int) -> None:
        """See `reference.release`."""
        ...

    def report(self, state: PoolState, slots: Tensor, numbers: Tensor) -> None:
        """See `reference.report`."""
        ...

    def plan_decode(self, state: PoolState, slots: Tensor, seq_lens: Tensor) -> DecodePlan:
        """See `reference.plan_decode`."""
        ...

    def append(
        self,
        state: PoolState,
        layer: int,
        plan: DecodePlan,
        key: Tensor,
        value: Tensor,
        signs: Tensor | None = None,
    ) -> None:
        """See `reference.append`."""
        ...

    def attend(
        self,
        state: PoolState,
        layer: int,
        slots: Tensor,
        query: Tensor,
        scale: float,
        output: Tensor,
        signs: Tensor | None = None,
        new: NewTokens | None = None,
    ) -> None:
        """See `reference.attend`."""
        ...


def load(device_type: str, backend: str | None = None) -> Ops:
    """The operations for a device.

    Args:
        device_type: device of the pool's tensors, "cpu" or "cuda".
        backend: "reference" for plain torch; None for the device's kernels.

    Raises:
        ConfigError: there are no such kernels. Nothing else is chosen instead.
    """
    if backend not in (None, "reference", device_type):
        raise ConfigError(
            f"backend must be {device_type} or reference on {device_type}, got {backend}"
        )
    # Imported when asked for: Triton need not be there, and C++ is compiled at first use
    if backend == "reference":
        from diffkv import reference

        return reference
    if device_type == "cpu":
        from diffkv.kernels import cpu

        return cpu
    if device_type != "cuda":
        raise ConfigError(f"DiffKV has kernels for cpu and cuda, not for {device_type}")
    try:
        from diffkv.kernels import triton
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the CUDA kernels need {error.name}: install it, or use the backend reference"
        ) from error
    return triton
