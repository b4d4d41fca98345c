"""Time calls, with cold caches, the candidates in turn, so that noise meets all alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from diffkv import huge_pages
from diffkv.lab.bench.facts import cache_bytes, percentile

__all__ = ["Case", "Timing", "measure", "read_case"]

WARM_UP = 2
FLUSH_CACHES = 4
MIN_FLUSH_BYTES = 128 << 20


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        name: of it.
        run: one call. On CUDA it only has to launch.
        num_bytes: useful bytes that a call must read; those of the tokens that are kept.
        facts: what its row says besides.
    """

    name: str
    run: Callable[[], Any]
    num_bytes: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: the median, and the 20th and 80th percentiles."""

    ms: float
    p20: float
    p80: float


def _flush_buffer(device: str) -> torch.Tensor:
    num_bytes = max(MIN_FLUSH_BYTES, FLUSH_CACHES * cache_bytes())
    buffer = torch.empty(num_bytes // 4, dtype=torch.float32, device=device)
    huge_pages.use(buffer)
    return buffer.fill_(1.0)


def read_case(device: str) -> Case:
    """A plain sum of a large tensor (a copy on CUDA): the bandwidth that a kernel could reach."""
    data = _flush_buffer(device)
    num_bytes = data.numel() * data.element_size()
    if device == "cuda":
        target = torch.empty_like(data)
        return Case("copy", lambda: target.copy_(data), 2 * num_bytes, {})
    return Case("read", data.sum, num_bytes, {})


def measure(
    cases: Sequence[Case],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = False,
) -> list[Timing]:
    """Time every case `repeats` times, in turn, each time after the caches were flushed.

    On CPUs the flush reads a buffer of several times the last cache: a write would still be on its way
    to memory while the case runs; `clock` gives seconds. On CUDA it overwrites one, and events time the
    device alone. Where `warm`, each case is called twice and the second call is timed, with no flush.
    """
    flush = _flush_buffer(device)
    ms: list[list[float]] = [[] for _ in cases]
    for repeat in range(WARM_UP + repeats):
        for case, values in zip(cases, ms, strict=True):
            before = case.run if warm else partial(_flush, flush)
            elapsed = (
                _time_cuda(case, before) if device == "cuda" else _time_cpu(case, before, clock)
            )
            if repeat >= WARM_UP:
                values.append(elapsed)
    return [Timing(median(v), percentile(v, 0.2), percentile(v, 0.8)) for v in ms]


def _flush(buffer: torch.Tensor) -> None:
    if buffer.is_cuda:
        buffer.zero_()
    else:
        buffer.sum()


def _time_cpu(case: Case, before: Callable[[], Any], clock: Callable[[], float]) -> float:
    before()
    start = clock()
    case.run()
    return (clock() - start) * 1e3


def _time_cuda(case: Case, before: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    start.record()
    case.run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
