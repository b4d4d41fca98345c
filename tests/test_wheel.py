"""What the wheel carries: the package, the small model and the prompts, and not the second model."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from diffkv.cli import main

ROOT = Path(__file__).parents[1]
MODEL = "diffkv/data/reference/model.safetensors"
MOST_BESIDE_IT = 1 << 20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (path,) = folder.glob("*.whl")
    return path


def test_is_small_but_for_the_one_model(wheel):
    members = zipfile.ZipFile(wheel).infolist()
    (model,) = (member for member in members if member.filename.endswith(".safetensors"))
    assert model.filename == MODEL
    assert wheel.stat().st_size - model.compress_size < MOST_BESIDE_IT


def test_has_what_users_run(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = [
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "diffkv").rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".yaml", ".jsonl"}
    ]
    assert set(sources) <= set(names)
    assert MODEL in names
    assert "diffkv/lab/evaluation/benchmarks.yaml" in names
    assert not [name for name in names if "reference-128" in name]


def test_a_model_that_is_not_there_is_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda package: Path("/nowhere"))
    assert main(["eval", "--model", "reference-128", "--n", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "diffkv: the model reference-128 comes with the repository, not with the package: clone it, "
        "or take reference"
    )
