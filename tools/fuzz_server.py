"""Send odd requests to DiffKV's server and the same to vLLM's own, and compare the answers.

Both serve the shipped model in float32, one after the other; DiffKV with k16v16, so that greedy
answers must be the same, word for word. With another --quant only statuses are compared. A request may
be refused only where stock vLLM refuses it, settings of DiffKV aside; nothing may be answered with an
error of the server that stock does not give too; at the end the engine lives, no request holds a block,
and no page is held but those of one last request.

    python tools/fuzz_server.py --num 500
    python tools/fuzz_server.py --num 500 --quant k8v4-k4v2 -- --scheduling-policy priority
    python tools/fuzz_server.py --first 123 --num 1 --verbose

Requests follow from --seed, each from its number: what differs is repeated by the last form. What
stands after -- is passed on to both servers. The last line is one JSON object; exit status 1 if
anything differs.
"""

import argparse
import asyncio
import contextlib
import json
import math
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fuzz_requests import Case, make_case
from fuzz_values import GOOD_SETTINGS, MODEL, MODEL_LEN, TIER_SETTINGS
from servers import DIFFKV, STOCK, Server, end_servers_when_terminated, running

FOLDER = Path(__file__).parents[1] / "src" / "diffkv" / "data" / "reference"
LOSSLESS = "k16v16"
TOLERANCE = 2e-3
"""Between figures such as log probabilities: sums in another order."""

NUM_SEQS = 16
KV_BYTES = 160 << 20
REQUEST_SECONDS = 120
STOP_SECONDS = 60
HASTY_SECONDS = 0.05
"""After which a client hangs up that waits for no answer."""

LEFT_ALONE = set(
    "id created created_at completed_at request_id response_id item_id system_fingerprint metrics "
    "cached_tokens prompt_tokens_details input_tokens_details cache_read_input_tokens "
    "cache_creation_input_tokens".split()
)
"""Fields of answers that are names or times, or depend on what was cached."""


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        status: HTTP's; 0 for a client that hung up, -1 for a connection that broke.
        content: the JSON of it, or the text that it streamed; None if nobody read it.
    """

    status: int
    content: Any = None


@dataclass
class Replay:
    """All answers of a server, by numbers of requests, and what was left at its end."""

    answers: dict[int, Answer] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def _streamed(lines: Sequence[str]) -> Any:
    """Texts of a stream by choice, how they ended, and errors."""
    texts: dict[str, str] = {}
    ends: list[Any] = []
    for line in lines:
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            ends.append(event["error"])
        for choice in event.get("choices") or []:
            name, delta = str(choice.get("index")), choice.get("delta") or {}
            piece = choice.get("text") or delta.get("content") or ""
            texts[name] = texts.get(name, "") + piece
            if choice.get("finish_reason"):
                ends.append([name, choice["finish_reason"], choice.get("stop_reason")])
        if "type" in event:
            delta = event.get("delta")
            text = delta.get("text", "") if isinstance(delta, dict) else delta
            texts["of events"] = texts.get("of events", "") + (text or "")
    return {"texts": texts, "ends": sorted(ends, key=str)}


async def _send(client: httpx.AsyncClient, case: Case) -> Answer:
    headers = {"Content-Type": case.content_type} if case.content_type else {}
    request = client.build_request("POST", case.path, content=case.body, headers=headers)
    if case.leaves_after == 0:
        with contextlib.suppress(asyncio.TimeoutError, httpx.HTTPError):
            await asyncio.wait_for(client.send(request), HASTY_SECONDS)
        return Answer(0)
    response = await client.send(request, stream=True)
    try:
        lines: list[str] = []
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            async for line in response.aiter_lines():
                lines.append(line)
                if case.leaves_after is not None and len(lines) >= case.leaves_after:
                    return Answer(0)
            return Answer(response.status_code, _streamed(lines))
        text = (await response.aread()).decode(errors="replace")
    finally:
        await response.aclose()
    try:
        return Answer(response.status_code, json.loads(text))
    except ValueError:
        return Answer(response.status_code, text)


async def _replay(url: str, cases: Sequence[Case], clients: int) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}
    waiting = iter(cases)

    async def work() -> None:
        # vLLM closes a connection without a word if it refused a request before it had read all of it
        anew = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, limits=anew) as client:
            for case in waiting:
                try:
                    answers[case.number] = await _send(client, case)
                except httpx.HTTPError as error:
                    answers[case.number] = Answer(-1, repr(error))

    await asyncio.gather(*(work() for _ in range(clients)))
    return answers


def _probe(server: Server) -> dict[str, float]:
    """Forget what is cached, send one request, and read the metrics after it."""
    server.wait_until_empty()
    httpx.post(f"{server.url}/reset_prefix_cache", timeout=30).raise_for_status()
    body = {"model": MODEL, "prompt": "<bos> k1 v2", "max_tokens": 2, "temperature": 0}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    return server.wait_until_empty()


def replay(command: Sequence[str], cases: Sequence[Case], clients: int) -> Replay:
    """Start a server, send it everything, and see what is left.

    Args:
        command: the server's.
        cases: requests, sent in this order.
        clients: how many are sent at once.
    """
    found = Replay()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        # to reset the prefix cache
        with running(command, log, {"VLLM_SERVER_DEV_MODE": "1"}) as server:
            before, start = _probe(server), time.monotonic()
            found.answers = asyncio.run(_replay(server.url, cases, clients))
            found.seconds = time.monotonic() - start
            try:
                after = _probe(server)
            except (AssertionError, httpx.HTTPError) as error:
                found.faults.append(f"at the end: {error!r}")
            else:
                for name in ("diffkv_pages_held", "diffkv_tokens_high", "diffkv_tokens_low"):
                    if before.get(name) != after.get(name):
                        found.faults.append(
                            f"{name}: {after[name]:g} at the end, not {before[name]:g}"
                        )
            if server.process.poll() is None:
                server.process.terminate()
            if server.process.wait(STOP_SECONDS):
                found.faults.append(f"the server ended with status {server.process.returncode}")
        lines = log.read_text().splitlines()
        found.faults += [line for line in lines if "(EngineCore" in line and "ERROR" in line][:20]
    return found


def _same(ours: Any, stock: Any) -> bool:
    if isinstance(ours, dict) and isinstance(stock, dict):
        names = (ours.keys() | stock.keys()) - LEFT_ALONE
        return all(_same(ours.get(name), stock.get(name)) for name in names)
    if isinstance(ours, list) and isinstance(stock, list):
        return len(ours) == len(stock) and all(map(_same, ours, stock))
    if isinstance(ours, float) and isinstance(stock, float):
        return math.isclose(ours, stock, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(ours == stock)


def difference(case: Case, ours: Answer, stock: Answer, quant: str) -> str | None:
    """What is wrong with an answer; None if it is as it should be."""
    good = (*GOOD_SETTINGS, *(() if quant == LOSSLESS else TIER_SETTINGS))
    if case.settings is not None and case.settings not in good:
        if ours.status == 400 and "diffkv" in str(ours.content):
            return None
        if stock.status == 200:
            return f"settings {case.settings} gave {ours.status}"
    if ours.status != stock.status:
        return f"status {ours.status}, stock {stock.status}"
    if stock.status == 200 and not (case.is_greedy and quant == LOSSLESS):
        return None
    if not _same(ours.content, stock.content):
        return "another answer"
    return None


def _kind(fault: str) -> str:
    """A line of a log without its time, place and numbers."""
    return re.sub(r"[0-9a-f]{6,}|\d+", "", fault)


def _commands(quant: str, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    # prompts that start together fit one step: vLLM's engine on CPUs ends when a request with a seed is
    # computed in parts (docs/vllm.md)
    common = f"""--served-model-name {MODEL} --dtype float32 --enforce-eager --max-num-seqs {NUM_SEQS}
        --max-model-len {MODEL_LEN} --max-num-batched-tokens {NUM_SEQS * MODEL_LEN}
        --kv-cache-memory-bytes {KV_BYTES} --disable-uvicorn-access-log""".split()
    common += flags
    ours = [*DIFFKV, str(FOLDER), "--quant", quant, *common]
    return ours, [*STOCK, str(FOLDER), *common]


def report(cases: Sequence[Case], ours: Replay, stock: Replay, quant: str, verbose: bool) -> int:
    """Print what was asked, what differs, and one JSON object; the exit status."""
    differing: list[str] = []
    for case in cases:
        said, expected = ours.answers[case.number], stock.answers[case.number]
        what = difference(case, said, expected, quant)
        if verbose or what:
            print(f"{case.number} {case.path} {case.content_type}: {what}")
            print(
                f"  {case.body[:1500]!r}\n  ours  {str(said)[:1500]}\n  stock {str(expected)[:1500]}"
            )
        differing += [f"{case.number}: {what}"] if what else []
    statuses = Counter((case.path, ours.answers[case.number].status) for case in cases)
    for (path, status), num in sorted(statuses.items()):
        print(f"{path:<28} {'hung up' if not status else status:>7} {num:>6}")
    usual = {_kind(fault) for fault in stock.faults}
    news = [fault for fault in ours.faults if _kind(fault) not in usual]
    result = {
        "quant": quant,
        "requests": len(cases),
        "compared_word_for_word": sum(
            case.is_greedy and quant == LOSSLESS and ours.answers[case.number].status == 200
            for case in cases
        ),
        "hung_up": sum(answer.status == 0 for answer in ours.answers.values()),
        "server_errors": sum(answer.status >= 500 for answer in ours.answers.values()),
        "server_errors_stock": sum(answer.status >= 500 for answer in stock.answers.values()),
        "differing": len(differing),
        "faults": news[:5],
        "faults_of_both": len(ours.faults) - len(news),
        "seconds": round(ours.seconds, 1),
        "seconds_stock": round(stock.seconds, 1),
        "passed": not differing and not news,
    }
    print(json.dumps(result))
    return 0 if result["passed"] else 1


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--num", type=int, default=500, help="requests")
    parser.add_argument("--clients", type=int, default=8, help="requests at once")
    parser.add_argument("--quant", default=LOSSLESS)
    parser.add_argument("--verbose", action="store_true", help="print all answers")
    parser.add_argument("flags", nargs="*", help="after --: flags of both servers")
    args = parser.parse_args()
    end_servers_when_terminated()
    cases = [make_case(args.seed, args.first + i) for i in range(args.num)]
    ours, stock = (
        replay(command, cases, args.clients) for command in _commands(args.quant, args.flags)
    )
    return report(cases, ours, stock, args.quant, args.verbose)


if __name__ == "__main__":
    sys.exit(main())
