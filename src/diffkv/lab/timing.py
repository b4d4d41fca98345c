"""Times calls: warmed up, caches cold, candidates in turn, on GPUs by events and from CUDA graphs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffkv import huge_pages

__all__ = [
    "Case",
    "Stopwatch",
    "Timer",
    "Timing",
    "capture",
    "measure",
    "peak_gb_per_s",
    "stream_case",
]

WARM_UP = 2
FLUSH_CACHES = 4
MIN_FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""Overwriting that many takes a GPU longer than a host needs to launch what is timed next."""

COPY_BYTES = 2 << 30
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        name: what it is called.
        run: one call. On CUDA it only has to launch, and launches the same each time.
        num_bytes: useful bytes that a call must move.
        facts: what its row says besides.
    """

    name: str
    run: Callable[[], Any]
    num_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: the median, and the 20th and 80th percentiles."""

    ms: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Timing":
        """Summarise what single calls took."""
        p20, ms, p80 = np.percentile(values, (20, 50, 80)).tolist()
        return cls(ms, p20, p80)


class Timer:
    """Times one call after another, each with cold caches.

    On CPUs the flush reads a buffer of several times the last cache: a write would still be on its way
    to memory while the call runs. On CUDA it overwrites one, and events time the device alone.

    Args:
        device: "cpu" or "cuda".
        clock: seconds, for CPUs.
    """

    def __init__(self, device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self._clock = clock
        self._buffer = _flush_buffer(device)

    def flush(self) -> None:
        """Make all caches cold."""
        if self.device == "cuda":
            self._buffer.zero_()
        else:
            self._buffer.sum()

    def ms(self, call: Callable[[], Any], before: Callable[[], Any] | None = None) -> float:
        """Milliseconds of a call.

        Args:
            call: what is timed.
            before: called before it, instead of the flush.
        """
        (before or self.flush)()
        if self.device == "cpu":
            begin = self._clock()
            call()
            return (self._clock() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def capture(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record what a call launches in a CUDA graph, without running it.

    Args:
        call: has run before, so that its kernels are compiled.

    Returns:
        what runs the graph; and the call's result, whose tensors a run fills.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def measure(
    cases: Sequence[Case],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = False,
) -> list[Timing]:
    """Time every case `repeats` times, all cases in turn, so that noise meets all alike.

    On CUDA each case runs from a graph: what its Python code costs is not in its time.

    Args:
        cases: what is timed.
        repeats: timed calls of each.
        device: "cpu" or "cuda".
        clock: seconds, for CPUs.
        warm: call each case twice and time the second call, with no flush.
    """
    timer = Timer(device, clock)
    calls = [case.run if device == "cpu" else _graph_of(case.run) for case in cases]
    ms: list[list[float]] = [[] for _ in cases]
    for repeat in range(WARM_UP + repeats):
        for call, values in zip(calls, ms, strict=True):
            elapsed = timer.ms(call, before=call if warm else None)
            if repeat >= WARM_UP:
                values.append(elapsed)
    return [Timing.of(values) for values in ms]


def _graph_of(call: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()  # graphs are warmed up on another stream than the usual one
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    return capture(call)[0]


class Stopwatch:
    """Times the parts of something that happens once, by name, such as the operations of a step.

    On CUDA a part that has run often enough to be warm runs from a graph of its own, after a flush; on
    CPUs each part finds the caches as the one before has left them.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self._timer = Timer(device) if device == "cuda" else None
        self._ms: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        """Run a call and note how long it took; its result."""
        values = self._ms.setdefault(name, [])
        if self._timer is None:
            begin = time.perf_counter()
            result = call()
            values.append((time.perf_counter() - begin) * 1e3)
        elif len(values) < WARM_UP:
            results: list[Any] = []
            values.append(self._timer.ms(lambda: results.append(call())))
            result = results[0]
        else:
            replay, result = capture(call)
            values.append(self._timer.ms(replay))
        return result

    def timings(self) -> dict[str, Timing]:
        """What each part took, without its first calls unless there are no others."""
        return {name: Timing.of(values[WARM_UP:] or values) for name, values in self._ms.items()}


def stream_case(device: str) -> Case:
    """The bandwidth that a kernel could reach: a sum of a large tensor on CPUs, a copy on CUDA."""
    if device == "cuda":
        from diffkv.lab import stream

        data = torch.ones(COPY_BYTES // 4, device=device)
        return Case("copy", partial(stream.copy, data, torch.empty_like(data)), 2 * data.nbytes)
    data = _flush_buffer(device)
    return Case("read", data.sum, data.nbytes)


def peak_gb_per_s(device: str) -> float | None:
    """Bandwidth of a GPU's memory by its clock and width; None for a CPU, which does not tell."""
    if device != "cuda":
        return None
    from triton.testing import get_dram_gbps

    return float(get_dram_gbps())


def _flush_buffer(device: str) -> torch.Tensor:
    num_bytes = max(MIN_FLUSH_BYTES[device], FLUSH_CACHES * _cache_bytes(device))
    buffer = torch.empty(num_bytes // 4, dtype=torch.float32, device=device)
    huge_pages.use(buffer)
    return buffer.fill_(1.0)


def _cache_bytes(device: str) -> int:
    """Bytes of the last cache; 32 MiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in CPU_CACHES.glob("index*/size")]
    known = [int(size[:-1]) * UNITS[size[-1]] for size in sizes if size[-1:] in UNITS]
    return max(known, default=32 << 20)
