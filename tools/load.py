"""Load a server with concurrent streaming clients that come, go and hang up; then count what is left.

Clients send prompts of random lengths, some hang up mid-stream. The pool is small enough to force
preemptions. At the end: no unexpected error, no block in use, and the greedy tokens of every answer that
was read to its end are compared with those that the same prompt got alone. With k16v16 they must all
be equal; with a lossy cache a preempted request is prefilled anew, decides anew, and may differ, so
there the share of equal answers is printed. With --watch the memory of the server's processes is
printed at intervals, and they must not have grown since their warm-up. The last line is one JSON
object; exit status 1 if a check fails.

    python tools/load.py --seconds 300
    python tools/load.py --seconds 60 --quant k8v4-k4v2 --clients 64
    python tools/load.py --seconds 600 --quant k8v4-k4v2 --clients 8 --kv-memory 33554432 --watch 10

Other flags go to the server: on a GPU `--dtype bfloat16 --no-enforce-eager` is how users run it.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from memory import Watch
from servers import DIFFKV, STOCK, Server, end_servers_when_terminated, running

MODEL = "reference"
FOLDER = Path(__file__).parents[1] / "src" / "diffkv" / "data" / MODEL
DRAIN_SECONDS = 30
MOST_GROWN = 32
"""MiB by which a process may have grown: heaps breathe."""

NO_PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
"""Of a server whose memory is watched: torch on CPUs keeps what it has prepared for each size of a
multiplication, up to a thousand, which looks like a leak until all sizes have come."""

WORDS = [f"k{i}" for i in range(200)] + [f"v{i}" for i in range(100)] + [";", "w1", "w2", "."]


@dataclass
class Outcome:
    """What the clients saw."""

    finished: int = 0
    hung_up: int = 0
    equal: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A prompt and how many tokens are asked for."""

    prompt: str
    max_tokens: int


def make_jobs(num: int, longest: int, most_tokens: int, seed: int) -> list[Job]:
    """Prompts of random lengths."""
    rng = random.Random(seed)
    return [
        Job(
            " ".join(["<bos>", *rng.choices(WORDS, k=rng.randint(4, longest))]),
            rng.randint(4, most_tokens),
        )
        for _ in range(num)
    ]


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[Server | None]:
    """A server of its own for the run; None where --url names one."""
    if args.url:
        yield None
        return
    ours = [*DIFFKV, MODEL, "--quant", args.quant]
    stock = [*STOCK, str(FOLDER), "--served-model-name", MODEL]
    common = f"""--dtype float32 --enforce-eager --max-model-len 1024 --max-num-seqs {args.clients}
        --kv-cache-memory-bytes {args.kv_memory} --disable-uvicorn-access-log""".split()
    command = [*(stock if args.stock else ours), *common, *args.flags]
    environment = NO_PRIMITIVES if args.watch else {}
    with tempfile.TemporaryDirectory() as folder:
        with running(command, Path(folder) / "log", environment) as started:
            yield started


async def ask(
    client: httpx.AsyncClient, url: str, job: Job, stop_after: int | None = None
) -> str | None:
    """Stream an answer; hang up after `stop_after` pieces, which returns None."""
    body = {
        "model": MODEL,
        "prompt": job.prompt,
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text, pieces = "", 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            text += json.loads(line[6:])["choices"][0]["text"]
            pieces += 1
            if stop_after is not None and pieces >= stop_after:
                return None
    return text


async def metric(url: str, name: str) -> float:
    """A figure of /metrics, summed over its labels."""
    async with httpx.AsyncClient() as client:
        lines = (await client.get(f"{url}/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


async def run_client(
    number: int,
    url: str,
    jobs: list[Job],
    alone: list[str],
    until: float,
    abort_share: float,
    outcome: Outcome,
) -> None:
    """Send jobs one after the other until the time is up."""
    rng = random.Random(number)
    async with httpx.AsyncClient(timeout=600) as client:
        while time.monotonic() < until:
            index = rng.randrange(len(jobs))
            stop_after = rng.randint(0, 8) if rng.random() < abort_share else None
            try:
                text = await ask(client, url, jobs[index], stop_after)
            except (RuntimeError, httpx.HTTPError) as error:
                outcome.errors.append(f"{type(error).__name__}: {error}")
                continue
            if text is None:
                outcome.hung_up += 1
            else:
                outcome.finished += 1
                outcome.equal += text == alone[index]


async def run(args: argparse.Namespace) -> int:
    """Everything; the exit status."""
    jobs = make_jobs(args.prompts, args.longest, args.most_tokens, args.seed)
    outcome = Outcome()
    with server(args) as started:
        url = args.url if started is None else started.url
        async with httpx.AsyncClient(timeout=600) as client:
            alone = [await ask(client, url, job) or "" for job in jobs]
        until = time.monotonic() + args.seconds
        before = await metric(url, "vllm:num_preemptions_total")
        watch, watching = None, None
        if args.watch:
            assert started is not None, "with --url there are no processes to watch"
            watch = Watch(started, args.watch, lambda: outcome.finished + outcome.hung_up)
            watching = asyncio.create_task(watch.run())
        await asyncio.gather(
            *(
                run_client(n, url, jobs, alone, until, args.abort_share, outcome)
                for n in range(args.clients)
            )
        )
        if watching is not None:
            watching.cancel()
        preemptions = await metric(url, "vllm:num_preemptions_total") - before
        used = await _used_at_last(url)
    grown = watch.growth() if watch else {}
    lossless = args.stock or args.quant == "k16v16"
    result = {
        "quant": "stock" if args.stock else args.quant,
        "flags": args.flags,
        "clients": args.clients,
        "seconds": args.seconds,
        "kv_memory": args.kv_memory,
        "finished": outcome.finished,
        "hung_up": outcome.hung_up,
        "equal_to_alone": outcome.equal,
        "preemptions": preemptions,
        "blocks_in_use_at_end": used,
        "errors": outcome.errors[:5],
        "num_errors": len(outcome.errors),
        "mib_grown": grown,
    }
    passed = not outcome.errors and used == 0 and outcome.finished > 0
    passed &= outcome.equal == outcome.finished or not lossless
    passed &= all(mib < MOST_GROWN for mib in grown.values())
    print(json.dumps({**result, "passed": passed}))
    return 0 if passed else 1


async def _used_at_last(url: str) -> float:
    """Share of the blocks that requests hold once nothing runs: who hung up is gone within seconds."""
    used = -1.0
    for _ in range(DRAIN_SECONDS):
        used = await metric(url, "vllm:kv_cache_usage_perc")
        if used == 0:
            break
        await asyncio.sleep(1)
    return used


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a running server; default: start one on the shipped model")
    parser.add_argument("--quant", default="k16v16")
    parser.add_argument("--stock", action="store_true", help="vLLM's own server, to compare with")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--prompts", type=int, default=24, help="different prompts")
    parser.add_argument("--longest", type=int, default=500, help="tokens of the longest prompt")
    parser.add_argument("--most-tokens", type=int, default=96, help="of the longest answer")
    parser.add_argument("--abort-share", type=float, default=0.2)
    parser.add_argument("--kv-memory", type=int, default=8 << 20, help="bytes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="print the memory of the server's processes every so many seconds",
    )
    args, flags = parser.parse_known_args()
    args.flags = flags
    if args.watch and args.url:
        parser.error("--watch needs a server of its own: leave out --url")
    if args.watch and not 0 < 4 * args.watch <= args.seconds:
        parser.error("--watch needs four readings at least: lower it, or raise --seconds")
    end_servers_when_terminated()
    return asyncio.run(run(args))


if __name__ == "__main__":
    sys.exit(main())
