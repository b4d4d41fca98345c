"""Servers of their own, for tests and for the programs beside this: started, watched, ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

__all__ = [
    "BIND",
    "DIFFKV",
    "STOCK",
    "Process",
    "Server",
    "end_servers_when_terminated",
    "free_port",
    "processes",
    "running",
]

DIFFKV = (sys.executable, "-m", "diffkv", "serve")
STOCK = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
"""Commands of servers, before the model."""

START_SECONDS = 420
STOP_SECONDS = 30
SETTLE_SECONDS = 30

BIND = "VLLM_CPU_OMP_THREADS_BIND"
PATIENT = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60"}
"""Connections are kept open: where a server waits for its turn longer than vLLM's five seconds, it
closes one that a client has just sent a request on."""


@dataclass(frozen=True)
class Process:
    """A process of a server.

    Attributes:
        pid: its id.
        role: `EngineCore`, `Worker` and the like, as vLLM names them; `server` for the first process,
            `tracker` for multiprocessing's own.
        rss: bytes in memory, shared ones included.
    """

    pid: int
    role: str
    rss: int


@dataclass
class Server:
    """A running one.

    Attributes:
        url: without a path.
        log: what it prints.
        process: the first of its processes.
    """

    url: str
    log: Path
    process: "subprocess.Popen[bytes]"

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1])

    def metrics(self) -> dict[str, float]:
        """Values by name, labels left out; those of the same name are added."""
        found: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
                found[name] = found.get(name, 0) + float(value)
        return found

    def wait_until_empty(self) -> dict[str, float]:
        """Metrics, once no request holds a block; AssertionError if that does not come to pass."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            found = self.metrics()
            busy = found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]
            used = found["vllm:kv_cache_usage_perc"]
            if not busy and not used:
                return found
            assert time.monotonic() < deadline, f"{used:.2%} used, {busy:.0f} requests known"
            time.sleep(0.2)

    def wait_until_gone(self) -> None:
        """Wait until all its processes have ended; AssertionError if that does not come to pass."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.2)

    def processes(self) -> list[Process]:
        """All its processes that are alive."""
        return processes(self.process.pid)


def processes(session: int) -> list[Process]:
    """The processes of a session that are alive, in order of their ids.

    Args:
        session: its id, which is that of its first process.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # what follows the program's name, which may have spaces
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session or fields[0] == "Z":
                continue
            title = (entry / "cmdline").read_text().replace("\0", " ").strip()
            role = title.removeprefix("VLLM::") if title.startswith("VLLM::") else "server"
            if "resource_tracker" in title:
                role = "tracker"
            resident = int((entry / "statm").read_text().split()[1])
            found.append(Process(int(entry.name), role, resident * os.sysconf("SC_PAGE_SIZE")))
    return sorted(found, key=lambda process: process.pid)


def end_servers_when_terminated() -> None:
    """Have this process leave its blocks when it is told to end, those of `running` among them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """A server, ready; all its processes end with the block.

    vLLM's variables of this process are not passed on, but for the one that binds to cores.

    Args:
        command: without its address.
        log: a file for what it prints.
        environment: its variables, beside those of this process.
        port: where it shall listen; None takes a free one.

    Raises:
        RuntimeError: it did not come up; has the end of its log.
    """
    url = f"http://127.0.0.1:{port or free_port()}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_") or k == BIND}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", url.rsplit(":", 1)[1], "--host", "127.0.0.1"],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**kept, **PATIENT, **(environment or {})},
        )
    try:
        _wait_until_up(url, process, log)
        yield Server(url, log, process)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_up(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None:
            raise RuntimeError(
                f"the server ended with status {process.returncode}:\n{log.read_text()[-3000:]}"
            )
        if time.monotonic() > deadline:
            raise RuntimeError(f"no server after {START_SECONDS} s:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)
