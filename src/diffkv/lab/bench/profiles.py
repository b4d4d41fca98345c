"""Where an engine's time goes, step by step."""

import cProfile
import pstats
import sys
from typing import Any

import torch

__all__ = ["Profiles"]

PROFILE_ROWS = 30


class Profiles:
    """Where the time goes, of steps with prompt tokens in them and of steps without, apart.

    On a GPU by torch's profiler, since there the time of a Python call says little.
    """

    def __init__(self, wanted: bool) -> None:
        make = _DeviceProfile if torch.cuda.is_available() else cProfile.Profile
        self._of_kind = {name: make() for name in ("prefill", "decode") if wanted}
        self._running: Any = None

    def start(self, kind: str) -> None:
        """Begin a step of a kind, if profiles are wanted."""
        self._running = self._of_kind.get(kind)
        if self._running is not None:
            self._running.enable()

    def stop(self) -> None:
        """End the step."""
        if self._running is not None:
            self._running.disable()
            self._running = None

    def show(self) -> None:
        """Print both to standard error, what took longest first."""
        for name, profile in self._of_kind.items():
            print(f"{name} steps:", file=sys.stderr)
            if isinstance(profile, cProfile.Profile):
                stats = pstats.Stats(profile, stream=sys.stderr)
                stats.sort_stats("tottime").print_stats(PROFILE_ROWS)
            else:
                print(profile.table(), file=sys.stderr)


class _DeviceProfile:
    """Kernels of some steps of one kind: the first few after the batch has grown."""

    STEPS = range(3, 6)

    def __init__(self) -> None:
        self._seen = 0
        self._profile: Any = None
        self._tables: list[str] = []

    def enable(self) -> None:
        """Begin a step."""
        if self._seen in self.STEPS:
            kinds = torch.profiler.ProfilerActivity
            self._profile = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])
            self._profile.start()
        self._seen += 1

    def disable(self) -> None:
        """End it."""
        if self._profile is not None:
            torch.cuda.synchronize()
            self._profile.stop()
            events = self._profile.key_averages()
            self._tables.append(events.table("self_device_time_total", row_limit=PROFILE_ROWS))
            self._profile = None

    def table(self) -> str:
        """Table of the last step that was looked at."""
        return self._tables[-1] if self._tables else "too few steps"
