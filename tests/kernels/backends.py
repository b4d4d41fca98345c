"""The operations as contract tests call them: with tensors on the CPU, whatever the device is."""

import copy
import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from make import assert_same, copy_of, fill, make_sums, make_tiers, make_tokens
from torch import Tensor

from diffkv import reference
from diffkv.kernels import cpu
from diffkv.state import DecodePlan, PoolState

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None


def import_triton() -> Any:
    """The Triton kernels, for a GPU or for the interpreter: Triton asks when kernels are defined."""
    if INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
    from diffkv.kernels import triton
    from diffkv.kernels.triton import constants

    assert constants.INTERPRETED == INTERPRETED, (
        "Triton was imported before TRITON_INTERPRET was set"
    )
    return triton


def ints(*values: int) -> Tensor:
    """Slots or lengths: [R] int32."""
    return torch.tensor(values, dtype=torch.int32)


@dataclasses.dataclass(frozen=True)
class Backend:
    """The operations of one backend, as attributes.

    Tensor arguments move to its device for the call, and come back with what it has written into them;
    a state that `place` has put there stays there, for kernels keep scratch memory for it.

    Attributes:
        name: "reference", "cpu" or "triton".
        module: where the operations are.
        device: "cpu" or "cuda".
    """

    name: str
    module: Any
    device: str

    @property
    def is_slow(self) -> bool:
        """Whether a call takes milliseconds a token or a program: fewer and smaller cases, then."""
        return self.name == "reference" or (self.name == "triton" and INTERPRETED)

    def place(self, value: Any) -> Any:
        """A tensor, or tensors of a dataclass, on the device; strides stay. Itself if it is there."""
        if isinstance(value, Tensor):
            if value.device.type == self.device:
                return value
            if value.is_contiguous():
                return value.to(self.device)
            assert value._base is not None, "neither contiguous nor a view"
            return value._base.to(self.device).as_strided(
                value.shape, value.stride(), value.storage_offset()
            )
        if not dataclasses.is_dataclass(value):
            return value
        moved = {f.name: self.place(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if all(moved[name] is getattr(value, name) for name in moved):
            return value
        return dataclasses.replace(value, **moved)

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        call = getattr(self.module, operation)

        def called(*args: Any) -> Any:
            placed = {id(arg): self.place(arg) for arg in args}  # an output may be an input, too
            result = call(*(placed[id(arg)] for arg in args))
            for arg in args:
                if isinstance(arg, Tensor) and placed[id(arg)] is not arg:
                    arg.copy_(placed[id(arg)])
            return on_cpu(result)

        return called

    def fill(self, state: PoolState, lens: list[int], **shares: float) -> None:
        """Store random tokens in a state on the CPU, by kernels that are fast.

        `store_prompt` has tests of its own.
        """
        if self.device == "cpu":
            fill(cpu, state, lens, **shares)
            return
        placed = self.place(state)
        fill(self, placed, lens, **shares)
        for each in dataclasses.fields(state):
            if isinstance(getattr(state, each.name), Tensor):
                getattr(state, each.name).copy_(getattr(placed, each.name))


def on_cpu(value: Any) -> Any:
    """Like `Backend.place`, on the CPU; of a tuple, each."""
    if isinstance(value, tuple):
        return tuple(map(on_cpu, value))
    return CPU.place(value)


REFERENCE = Backend("reference", reference, "cpu")
CPU = Backend("cpu", cpu, "cpu")


def gather(
    ops: Backend, state: PoolState, layer: int, slots: list[int], lens: list[int], first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Key, value and tiers of some rows, each in a place of such a length; before the first one, 7."""
    num, heads = first + sum(lens), state.num_kv_heads
    key = torch.full((num, heads, state.layout.head_dim), 7.0, dtype=state.dtype)
    value, tiers = key.clone(), torch.full((heads, num), 7, dtype=torch.int8)
    starts = torch.tensor([first, *lens], dtype=torch.int32).cumsum(0).int()[: len(slots)]
    ops.gather(state, layer, ints(*slots), starts.contiguous(), key, value, tiers)
    return key, value, tiers


class Pair:
    """A pool of a backend and one of the reference: every call goes to both, and they stay the same.

    Attributes:
        state: the backend's, on its device.
        expected: the reference's.
    """

    def __init__(self, kernels: Backend, state: PoolState):
        self.kernels, self.expected = kernels, state
        self.state = kernels.place(copy_of(state))

    def both(self, operation: str, *args: Any) -> tuple[Any, Any]:
        """What each returns."""
        got = getattr(self.kernels, operation)(self.state, *args)
        wanted = getattr(reference, operation)(self.expected, *args)
        self.check()
        return got, wanted

    def check(self) -> None:
        """All tables and every byte of every page agree."""
        assert_same(on_cpu(self.state), self.expected)

    def store(
        self,
        slots: list[int],
        lens: list[int],
        layer: int = 0,
        tiers: Tensor | None = None,
        sums: Tensor | None = None,
        starts: list[int] | None = None,
    ) -> None:
        """Store random tokens; tiers and sums are random too unless they are given."""
        tokens, num = make_tokens(self.expected, slots, lens, starts, layer), sum(lens)
        tiers = make_tiers(self.expected, num) if tiers is None else tiers
        sums = make_sums(self.expected, num) if sums is None else sums
        self.both("store_prompt", layer, tokens, tiers, sums)

    def gather(self, layer: int, slots: list[int], lens: list[int], first: int = 0) -> None:
        """Read rows back into places of such lengths, the first of which begins at `first`."""
        got = gather(self.kernels, self.state, layer, slots, lens, first)
        wanted = gather(REFERENCE, self.expected, layer, slots, lens, first)
        assert all(torch.equal(*each) for each in zip(got, wanted, strict=True))
        self.check()

    def exact(self) -> "Pair":
        """The same pools, for rows whose tokens are as the model made them."""
        pair = copy.copy(self)
        pair.state, pair.expected = self.state.exact(), self.expected.exact()
        return pair

    def plan(self, slots: Tensor, seq_lens: Tensor) -> tuple[DecodePlan, DecodePlan]:
        """Plan a decode step."""
        plans = self.both("plan_decode", slots, seq_lens)
        for name in ("slots", "positions", "places"):
            assert torch.equal(*(getattr(plan, name) for plan in plans)), name
        return plans

    def append(self, plans: tuple[DecodePlan, DecodePlan], layer: int) -> None:
        """Append random tokens."""
        state = self.expected
        shape = (2, len(plans[0].slots), state.num_kv_heads, state.layout.head_dim)
        key, value = torch.randn(shape).to(state.dtype)
        self.kernels.append(self.state, layer, plans[0], key, value)
        reference.append(state, layer, plans[1], key, value)
        self.check()

    def step(self, slots: list[int], seq_lens: list[int]) -> DecodePlan:
        """Plan and append, all layers."""
        plans = self.plan(ints(*slots), ints(*seq_lens))
        for layer in range(self.expected.num_layers):
            self.append(plans, layer)
        return dataclasses.replace(plans[1], places=plans[1].places.clone())

    def release(self, slots: list[int], layer: int = -1) -> None:
        """Release requests."""
        self.both("release", ints(*slots), layer)
