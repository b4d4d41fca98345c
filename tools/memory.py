"""The memory of a server's processes over time: a table while it runs, and its growth at the end."""

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from servers import Server

__all__ = ["Watch"]

MIB = 1 << 20


@dataclass
class Watch:
    """Reads the resident memory of all processes of a server at intervals.

    Attributes:
        server: a running one.
        every: seconds between readings.
        num_requests: tells how many requests have been made so far.
        readings: MiB of each process, by its name, reading by reading.
    """

    server: Server
    every: float
    num_requests: Callable[[], int]
    readings: list[dict[str, float]] = field(default_factory=list)

    async def run(self) -> None:
        """Read, and print a line each time, until it is cancelled."""
        start = time.monotonic()
        while True:
            found = {process.role: process.rss / MIB for process in self.server.processes()}
            if not self.readings:
                print(
                    "seconds  requests  " + "  ".join(f"{name:>12}" for name in found) + "  (MiB)"
                )
            self.readings.append(found)
            figures = "  ".join(f"{mib:12.1f}" for mib in found.values())
            print(
                f"{time.monotonic() - start:7.0f}  {self.num_requests():8}  {figures}", flush=True
            )
            await asyncio.sleep(self.every)

    def growth(self) -> dict[str, float]:
        """MiB by which each process has grown since its warm-up, the first quarter of the time.

        The median of the last quarter of the readings, less that of the second.
        """
        quarter = len(self.readings) // 4
        assert quarter, "four readings at least"
        second, last = self.readings[quarter : 2 * quarter], self.readings[-quarter:]
        return {
            name: round(
                statistics.median(reading.get(name, 0.0) for reading in last)
                - statistics.median(reading.get(name, 0.0) for reading in second),
                1,
            )
            for name in self.readings[-1]
        }
