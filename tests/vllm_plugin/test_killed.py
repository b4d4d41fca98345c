"""A process of the server is killed: the server ends and says so, and nothing is left of it."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from servers import DIFFKV, Server, running

END_SECONDS = 60
FLAGS = (
    *("--max-model-len", "4096", "--enforce-eager", "--dtype", "float32"),
    *("--kv-cache-memory-bytes", str(16 << 20), "--max-num-seqs", "4"),
)


def shared_memory(server: Server) -> set[str]:
    """The files in /dev/shm that processes of the server have mapped."""
    maps = [Path(f"/proc/{each.pid}/maps").read_text() for each in server.processes()]
    return set(re.findall(r"/dev/shm/\S+", "".join(maps)))


def kill(server: Server, role: str) -> int:
    """Kill a process of that role while a request is answered; the status that the client sees."""
    (victim,) = (process for process in server.processes() if process.role == role)
    body = {"model": "reference", "prompt": "k1 v2 ;", "max_tokens": 4000, "ignore_eos": True}
    with ThreadPoolExecutor(1) as threads:
        url, answer = f"{server.url}/v1/completions", None
        while answer is None or not server.metrics()["vllm:num_requests_running"]:
            if answer is None or answer.done():  # before anybody saw it run
                answer = threads.submit(httpx.post, url, json=body, timeout=60)
        os.kill(victim.pid, signal.SIGKILL)
        return answer.result().status_code


def test_server_ends_and_starts_again_where_it_was(tmp_path: Path) -> None:
    port = None
    for role in ("EngineCore", "Worker"):
        log = tmp_path / role
        with running([*DIFFKV, "reference", *FLAGS], log, port=port) as server:
            port = server.port
            memory = shared_memory(server)
            assert memory
            assert kill(server, role) == 500
            assert server.process.wait(END_SECONDS) == 1
            server.wait_until_gone()
        assert not [name for name in memory if os.path.exists(name)]
        lines = log.read_text().splitlines()
        assert [line for line in lines if line.startswith("diffkv: the engine died")]
