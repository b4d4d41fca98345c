"""Odd requests, beside stock vLLM; more of them: tools/fuzz_server.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_requests import Case, make_case
from fuzz_server import Answer, difference

SCRIPT = Path(__file__).parents[2] / "tools" / "fuzz_server.py"
NUM = 150

REFUSED = Answer(400, {"error": {"message": "diffkv must be"}})


def said(text: str, **others: Any) -> Answer:
    return Answer(200, {"id": text, "choices": [{"text": text, "logprob": -1.0, **others}]})


@pytest.mark.parametrize(
    ("settings", "ours", "stock", "what"),
    [
        (None, said("a"), said("a", created=1), None),
        (None, said("a", logprob=-1.001), said("a"), None),
        (None, said("a", logprob=-1.01), said("a"), "another answer"),
        (None, said("b"), said("a"), "another answer"),
        (None, Answer(500), said("a"), "status 500, stock 200"),
        (None, Answer(500), Answer(400), "status 500, stock 400"),
        (None, Answer(-1, "broke"), Answer(-1, "broke"), None),
        (None, REFUSED, said("a"), "status 400, stock 200"),
        ({"diffkv": "off"}, said("a"), said("a"), None),
        ({"diffkv": "off"}, said("b"), said("a"), "another answer"),
        ({"diffkv": "off"}, REFUSED, said("a"), "status 400, stock 200"),
        ({"diffkv": "of"}, REFUSED, said("a"), None),
        ({"diffkv": "of"}, REFUSED, Answer(404), None),
        ({"diffkv": "of"}, said("a"), said("a"), "settings {'diffkv': 'of'} gave 200"),
        ({"diffkv": "of"}, Answer(500), Answer(404), "status 500, stock 404"),
        ({"diffkv_alpha_high": 2}, REFUSED, said("a"), None),
    ],
)
def test_what_counts_as_a_difference(
    settings: dict[str, Any] | None, ours: Answer, stock: Answer, what: str | None
) -> None:
    case = Case(0, "/v1/completions", b"", settings=settings)
    assert difference(case, ours, stock, "k16v16") == what


def test_engines_with_two_tiers_take_more_settings_and_answer_otherwise() -> None:
    case = Case(0, "/v1/completions", b"", settings={"diffkv_alpha_high": 2})
    assert difference(case, REFUSED, said("a"), "k8v4-k4v2") == "status 400, stock 200"
    assert difference(case, said("b"), said("a"), "k8v4-k4v2") is None


def test_a_request_follows_from_its_seed_and_number() -> None:
    assert make_case(3, 7) == make_case(3, 7) != make_case(3, 8)
    assert make_case(3, 7).body != make_case(4, 7).body


def test_requests_are_answered_as_by_stock_vllm() -> None:
    run = subprocess.run(
        [sys.executable, SCRIPT, "--num", str(NUM)], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["requests"] == NUM
    assert result["differing"] == 0 and result["faults"] == []
    assert result["compared_word_for_word"] > NUM // 4
    assert result["hung_up"] > 0
