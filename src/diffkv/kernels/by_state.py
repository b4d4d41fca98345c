"""What kernels need of a pool, made once and forgotten with it."""

import functools
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

from diffkv.state import PoolState

__all__ = ["by_state"]

T = TypeVar("T")


def by_state(make: Callable[[PoolState], T]) -> Callable[[PoolState], T]:
    """Remember what a function makes of a state for as long as the state lives.

    Args:
        make: function of a state, which its result must not refer to.
    """
    made: WeakKeyDictionary[PoolState, T] = WeakKeyDictionary()

    @functools.wraps(make)
    def of(state: PoolState) -> T:
        found = made.get(state)
        if found is None:
            found = made[state] = make(state)
        return found

    return of
