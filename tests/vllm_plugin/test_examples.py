"""The examples run as they are. The client is run against a server in test_server.py."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(name: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_offline() -> None:
    *answers, summary = run("offline.py")
    assert len(answers) == 8
    assert all(answer.endswith("(right)") for answer in answers)
    assert float(summary.split(": ")[-1].split()[0]) > 3


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
    assert num_bytes[1] > num_bytes[0] > num_bytes[2]
    assert " 0% dropped" not in lines[3]
    assert lines[4].startswith("refused: diffkv_alpha_high must be a number of 0 or more, got -1")


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    for file in (ROOT / "examples").iterdir():
        if file.suffix in (".py", ".sh"):
            assert f"| `{file.name}` |" in listed
