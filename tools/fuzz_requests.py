"""Requests to an OpenAI-compatible server, good ones and odd ones, made from a seed.

A request is made of fields that its endpoint knows, each with values that make sense and values that
make none. A few are no JSON at all, and of some the client hangs up. The same seed and number give the
same request, whatever else is asked for.
"""

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fuzz_values import (
    CHAT,
    COMPLETION,
    JUNK,
    LARGE,
    MESSAGES,
    MESSAGES_API,
    MODEL,
    MODEL_LEN,
    RESPONSES,
    TOKENIZE,
    XARGS,
)

__all__ = ["ENDPOINTS", "Case", "make_case"]


BATCH = "/v1/chat/completions/batch"


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        number: its place in the sequence of the seed.
        path: where it is sent.
        body: as it is sent.
        content_type: likewise.
        is_stream: whether the answer comes in pieces.
        leaves_after: pieces of the stream after which the client hangs up; 0: before it reads; None:
            it reads all.
        is_greedy: whether the answer is determined by the request.
        settings: those of DiffKV that it gives; None if there are none.
    """

    number: int
    path: str
    body: bytes
    content_type: str = "application/json"
    is_stream: bool = False
    leaves_after: int | None = None
    is_greedy: bool = True
    settings: dict[str, Any] | None = None


def _words(rng: random.Random, num: int) -> str:
    names = [f"{rng.choice('kv')}{rng.randrange(200)}" for _ in range(num)]
    return " ".join(word + (" ;" if i % 2 else "") for i, word in enumerate(names))


def _document(rng: random.Random) -> str:
    """One of a few beginnings, so that others have computed it, and an end of its own or none."""
    number = rng.randrange(12)
    beginning = "<bos> " + _words(random.Random(number), (3, 20, 60, 130)[number % 4])
    return beginning + " " + _words(rng, rng.choice((0, 0, 1, 2, 5, 30))) + " ? k1"


def _prompt(rng: random.Random) -> Any:
    if rng.random() < 0.8:
        return _document(rng)
    ids = [1, *(rng.randrange(10, 400) for _ in range(rng.choice((1, 5, 15, 64, 128, 300))))]
    odd: list[Any] = [
        ids,
        ids,
        [ids, ids[:3]],
        [_document(rng), "k1"],
        [*ids, 512],
        [*ids, -1],
        [*ids, LARGE],
        [],
        [[]],
        "",
        " ",
        None,
        [1, "k1"],
        [[1], "k1"],
        "\U0001f999 \u0000 k1",
        "k1 " * MODEL_LEN,
        [1] * MODEL_LEN,
        [1] * (MODEL_LEN - 1),
        [[1]] * 5,
        [""],
        7,
        {"a": 1},
        [1.5],
        [True],
        "<eos>",
        "<bos> <pad> <unk>",
    ]
    return rng.choice(odd)


def _messages(rng: random.Random) -> Any:
    if rng.random() < 0.15:
        return rng.choice(MESSAGES)
    turns = [{"role": "user", "content": _document(rng)}]
    if rng.random() < 0.3:
        answer = {"role": "assistant", "content": _words(rng, 2)}
        turns += [answer, {"role": "user", "content": "? k1"}]
    return turns


def _max_tokens(rng: random.Random) -> Any:
    return rng.choice((1, 2, 5, 8, 16, 24)) if rng.random() < 0.92 else rng.choice((0, -1, LARGE))


def _completion(rng: random.Random) -> dict[str, Any]:
    return {"model": MODEL, "prompt": _prompt(rng), "max_tokens": _max_tokens(rng)}


def _chat(rng: random.Random) -> dict[str, Any]:
    return {"model": MODEL, "messages": _messages(rng), "max_tokens": _max_tokens(rng)}


def _chat_batch(rng: random.Random) -> dict[str, Any]:
    return {**_chat(rng), "messages": [_messages(rng) for _ in range(rng.choice((1, 2, 3)))]}


def _responses(rng: random.Random) -> dict[str, Any]:
    given = _document(rng) if rng.random() < 0.5 else _messages(rng)
    return {"model": MODEL, "input": given, "max_output_tokens": _max_tokens(rng), "store": False}


def _tokenize(rng: random.Random) -> dict[str, Any]:
    return {"prompt": _prompt(rng)} if rng.random() < 0.5 else {"messages": _messages(rng)}


def _detokenize(rng: random.Random) -> dict[str, Any]:
    return {"tokens": _prompt(rng)}


def _count(rng: random.Random) -> dict[str, Any]:
    return {"model": MODEL, "messages": _messages(rng)}


@dataclass(frozen=True)
class _Endpoint:
    share: int
    make: Callable[[random.Random], dict[str, Any]]
    fields: Mapping[str, tuple[Any, ...]]
    is_generating: bool = True


ENDPOINTS: Mapping[str, _Endpoint] = {
    "/v1/completions": _Endpoint(40, _completion, COMPLETION),
    "/v1/chat/completions": _Endpoint(25, _chat, CHAT),
    "/v1/responses": _Endpoint(12, _responses, RESPONSES),
    "/v1/messages": _Endpoint(6, _chat, MESSAGES_API),
    BATCH: _Endpoint(4, _chat_batch, CHAT),
    "/invocations": _Endpoint(3, _completion, COMPLETION),
    "/tokenize": _Endpoint(4, _tokenize, TOKENIZE, False),
    "/detokenize": _Endpoint(3, _detokenize, TOKENIZE, False),
    "/v1/messages/count_tokens": _Endpoint(3, _count, MESSAGES_API, False),
}


def _change(rng: random.Random, body: dict[str, Any], endpoint: _Endpoint) -> None:
    """Set some fields, most of them to something that makes sense; now and then take one away."""
    num = min(rng.choice((0, 0, 1, 1, 1, 2, 3, 4)), len(endpoint.fields))
    for name in rng.sample(sorted(endpoint.fields), num):
        values = endpoint.fields[name]
        if rng.random() < 0.7:  # those that come first make sense, but for settings
            values = values[: (len(values) + 1) // 2]
        body[name] = rng.choice(JUNK if rng.random() < 0.08 else values)
    if rng.random() < 0.04:
        body[rng.choice(sorted(body))] = rng.choice(JUNK)
    if rng.random() < 0.02:
        del body[rng.choice(sorted(body))]


def _raw(rng: random.Random, text: str) -> tuple[bytes, str]:
    """What is sent of a body, and its type: now and then no JSON."""
    body, kind = text.encode(), "application/json"
    if rng.random() >= 0.03:
        return body, kind
    odd: list[tuple[bytes, str]] = [
        (b"", kind),
        (body[: len(body) // 2], kind),
        (b"null", kind),
        (b"[]", kind),
        (b"7", kind),
        (b"\xff\xfe{}", kind),
        (b"[" * 5000, kind),
        (body, "text/plain"),
        (body, ""),
        (b'"' + b"a" * 100_000 + b'"', kind),
        (body.replace(b"{", b'{"model": 1, "model": 2,', 1), kind),
        (body.replace(b"diffkv", b"\\u0064iffkv"), kind),
    ]
    return rng.choice(odd)


def make_case(seed: int, number: int) -> Case:
    """The request of a number; those of the same seed share beginnings of prompts."""
    rng = random.Random(f"{seed} {number}")
    paths = list(ENDPOINTS)
    path = rng.choices(paths, [ENDPOINTS[path].share for path in paths])[0]
    endpoint = ENDPOINTS[path]
    body = endpoint.make(rng)
    if endpoint.is_generating:
        body["temperature"] = 0 if rng.random() < 0.9 else rng.choice((0.7, 2, -1, math.nan))
        if rng.random() < 0.3:
            body["stream"] = True
        if rng.random() < 0.1:
            body["vllm_xargs"] = rng.choice(XARGS)
    _change(rng, body, endpoint)
    raw, kind = _raw(rng, json.dumps(body))
    is_stream = body.get("stream") is True
    leaves = rng.choice((0, 1, 2, 4)) if is_stream and rng.random() < 0.3 else None
    settings = body.get("vllm_xargs")
    is_greedy = body.get("temperature") == 0 and type(body["temperature"]) is int
    if is_stream and path == BATCH:  # vLLM answers with the pieces that came last (docs/vllm.md)
        is_greedy = False
    is_ours = isinstance(settings, dict) and any(
        str(name).startswith("diffkv") for name in settings
    )
    return Case(
        number,
        path,
        raw,
        kind,
        is_stream,
        leaves,
        is_greedy=is_greedy,
        settings=settings if is_ours else None,
    )
