"""Serving: a server for each setting, Poisson arrivals at several rates, vLLM's own client."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkv.lab.bench.throughput import Setting
from diffkv.lab.rows import Writer
from diffkv.quant import ConfigError

__all__ = ["Traffic", "run"]

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
THREADS = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}
"""For all servers, unless the environment says otherwise, so that they run on as many threads.

vLLM leaves one core of a CPU to other processes, and one more where there is a KV connector, as in
DiffKV; of two cores it then leaves none."""

START_SECONDS = 600
STOP_SECONDS = 60
METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 95, 99)
FIGURES = ("request_throughput", "output_throughput", "request_goodput", "completed", "failed")


@dataclass(frozen=True)
class Traffic:
    """What the client sends.

    Attributes:
        rates: requests a second, one run each; arrivals are a Poisson process.
        num_prompts: requests of a run.
        input_len: tokens of a prompt, at random.
        output_len: tokens of an answer.
        goodput: what a good answer keeps to, as vLLM's client takes it: "ttft:1000".
        extra_body: fields of every request to DiffKV, such as its thresholds.
    """

    rates: list[float]
    num_prompts: int
    input_len: int
    output_len: int
    goodput: list[str]
    extra_body: dict[str, Any] | None = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(setting: Setting, model: str, port: int, flags: Sequence[str]) -> list[str]:
    if setting.options is None:
        command = [*VLLM, "serve", model, "--no-enable-prefix-caching"]
    else:
        command = [sys.executable, "-m", "diffkv", "serve", model]
        for name, value in setting.options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in setting.engine.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return [
        *command,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--disable-uvicorn-access-log",
        *flags,
    ]


@contextlib.contextmanager
def _server(setting: Setting, model: str, flags: Sequence[str], log: Path) -> Iterator[str]:
    """A server for a while, at the URL that is given.

    Raises:
        ConfigError: it did not come up; has the last line of its log.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**THREADS, **os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    with log.open("w") as file:
        process = subprocess.Popen(
            _command(setting, model, port, flags), stdout=file, stderr=file, env=environment
        )
        try:
            _wait_until_up(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_up(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = ([line for line in log.read_text().splitlines() if line.strip()] or ["?"])[-1]
            raise ConfigError(f"the server ended with status {process.returncode}: {last}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        time.sleep(1)
    raise ConfigError(f"the server was not up after {START_SECONDS} s")


def _client(
    url: str, model: str, traffic: Traffic, rate: float, is_ours: bool, folder: Path
) -> dict[str, Any]:
    """One run of `vllm bench serve`; its result as it saves it.

    Raises:
        ConfigError: the client failed; has its last line.
    """
    result = folder / f"{rate:g}.json"
    command = [
        *VLLM,
        "bench",
        "serve",
        "--backend",
        "openai",
        "--base-url",
        url,
        "--model",
        model,
        "--dataset-name",
        "random",
        "--random-input-len",
        str(traffic.input_len),
        "--random-output-len",
        str(traffic.output_len),
        "--num-prompts",
        str(traffic.num_prompts),
        "--request-rate",
        f"{rate:g}",
        "--burstiness",
        "1",
        "--seed",
        "0",
        "--ignore-eos",
        "--temperature",
        "0",
        "--percentile-metrics",
        ",".join(METRICS),
        "--metric-percentiles",
        ",".join(map(str, PERCENTILES)),
        "--disable-tqdm",
        "--save-result",
        "--num-warmups",
        "1",
        "--result-dir",
        str(folder),
        "--result-filename",
        result.name,
    ]
    if traffic.goodput:
        command += ["--goodput", *traffic.goodput]
    if traffic.extra_body and is_ours:
        command += ["--extra-body", json.dumps(traffic.extra_body)]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not result.exists():
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise ConfigError(f"vLLM's client ended with status {done.returncode}: {lines[-1]}")
    return json.loads(result.read_text())


def run(
    model: str,
    traffic: Traffic,
    compared: Sequence[Setting],
    flags: Sequence[str],
    writer: Writer,
    facts: dict[str, Any],
    url: str | None = None,
) -> None:
    """Serve with every setting, and send it every rate.

    Args:
        model: a folder or a model id.
        traffic: what the client sends.
        compared: settings; with `url` there is one, that of the server there.
        flags: options of `vllm serve`, for all settings.
        writer: gets a row for each setting and rate.
        facts: settings that belong into every row.
        url: address of a server that runs already.

    Raises:
        ConfigError: no server could be measured.
    """
    num_measured, reason = 0, ""
    with tempfile.TemporaryDirectory(prefix="diffkv-bench-") as name:
        folder = Path(name)
        for setting in compared:
            server = (
                contextlib.nullcontext(url)
                if url is not None
                else _server(setting, model, flags, folder / "server.log")
            )
            try:
                with server as at:
                    for rate in traffic.rates:
                        ours = setting.options is not None or url is not None
                        result = _client(str(at), model, traffic, rate, ours, folder)
                        _add_row(writer, setting, traffic, rate, result, facts)
                        num_measured += 1
            except ConfigError as error:
                reason = str(error)
                text = f"  {setting.label}: did not run: {reason}"
                writer.add("serving", {**facts, **setting.case}, {}, text, reason)
    if not num_measured:
        raise ConfigError(f"no server could be measured: {reason}")


def _add_row(
    writer: Writer,
    setting: Setting,
    traffic: Traffic,
    rate: float,
    result: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    case = {
        **facts,
        **setting.case,
        "rate": rate,
        "input_len": traffic.input_len,
        "output_len": traffic.output_len,
        "requests": traffic.num_prompts,
        "goodput_limits": traffic.goodput,
        "extra_body": traffic.extra_body if setting.options is not None else None,
    }
    latencies = [f"p{p}_{metric}_ms" for metric in METRICS for p in PERCENTILES]
    measured = {
        name: result[name] for name in (*FIGURES, *latencies) if result.get(name) is not None
    }
    text = (
        f"  {setting.label:24} {rate:6.2f} requests/s: {result['output_throughput']:.1f} tokens/s"
    )
    for metric in METRICS:
        values = [result.get(f"p{p}_{metric}_ms") for p in PERCENTILES]
        text += f", {metric} " + "/".join("-" if v is None else f"{v:.0f}" for v in values)
    if traffic.goodput:
        text += f", good {result['request_goodput']:.2f} requests/s"
    text += f" ms (p50/p95/p99), {result['failed']} failed"
    writer.add("serving", case, measured, text)
