"""The examples run as they are. The client is run against a server in test_server.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import make  # isort: skip

ROOT = Path(__file__).parents[2]
TURN = re.compile(r"turn \d: a prompt of (\d+) tokens, (\d+) of them cached; .* ms")


def run(name: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_offline() -> None:
    *answers, summary = run("offline.py")
    assert len(answers) == 8
    assert all(answer.endswith("(right)") for answer in answers)
    assert float(summary.split(": ")[-1].split()[0]) > 3


def test_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = str(make("qwen3", tmp_path))
    sampled = ("--thinking", "--samples", "2", "--max-tokens", "8")
    lines = run("chat.py", "--model", model, "--question", "w1 w2", "--uncompressed", *sampled)
    assert lines[0].startswith("preset balanced (nothing is published for Qwen3ForCausalLM with 2")
    titles = [line for line in lines if line.startswith("-- ")]
    compressed, uncompressed = "-- w1 w2 (compressed)", "-- w1 w2 (all tokens high)"
    assert [title.split(": ")[0] for title in titles] == 2 * [compressed] + 2 * [uncompressed]
    assert lines[-1].startswith("rank 0: ")
    assert " 0 dropped; " in lines[-1]


def test_chat_turns(tmp_path: Path) -> None:
    model = str(make("qwen3", tmp_path))
    questions = ("--question", "w1 w2", "--question", "w3 w4 w5")
    arguments = ("--model", model, *questions, "--max-tokens", "8")
    lines = [line for line in run("chat_turns.py", *arguments) if line.startswith("turn ")]
    prompts, cached = zip(*(map(int, TURN.fullmatch(line).groups()) for line in lines), strict=True)
    # What a model of random weights answers is tokenised in another way when it comes back
    assert cached[0] == 0 <= cached[1] < prompts[1]
    plain = run("chat_turns.py", *arguments, "--no-prefix-caching")
    assert sum(" 0 of them cached" in line for line in plain) == 2


def test_hf_generate() -> None:
    *answers, summary = run("hf_generate.py")
    assert len(answers) == 3
    assert all(answer.endswith("(right)") for answer in answers)
    assert float(summary.split(": ")[-1].split()[0]) > 3


def test_per_request() -> None:
    lines = run("per_request.py")
    assert len(lines) == 5
    assert all("k92 v1 k252 v99" in line for line in lines[:3])
    assert "(100% high, 0% low, 0% dropped" in lines[1]
    num_bytes = [float(line.split(" B a token")[0].split()[-1]) for line in lines[:4]]
    assert num_bytes[1] > num_bytes[2] > num_bytes[0] > num_bytes[3]
    assert " 0% dropped" not in lines[3]
    assert lines[4].startswith("refused: diffkv_alpha_high must be a number of 0 or more, got -1")


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    for file in (ROOT / "examples").iterdir():
        if file.suffix in (".py", ".sh"):
            assert f"| `{file.name}` |" in listed
