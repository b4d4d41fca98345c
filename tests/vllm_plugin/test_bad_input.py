"""What cannot be done ends in one line that says what would work, exit status 2 and no traceback."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MODEL, engine

from diffkv.cli import main
from diffkv.quant import ConfigError

PROMPT = ("--prompt", "<bos> k1 v2 ; ? k1", "--max-tokens", "2")


@pytest.fixture(autouse=True)
def quiet_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's log handlers hold the captured stream of the test that first imported it."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command line ends in."""
    try:
        status: Any = main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.splitlines()
    if lines[-1].startswith("Try 'diffkv"):
        lines.pop()
    assert len([line for line in lines if line.startswith("diffkv: ")]) == 1
    assert lines[-1].startswith("diffkv: ")
    assert "Traceback" not in captured.err
    return lines[-1].removeprefix("diffkv: ")


@pytest.mark.parametrize("command", ["generate", "serve"])
@pytest.mark.parametrize(
    ("options", "message", "would_work"),
    [
        (["--quant", "nonsense"], "unknown format 'nonsense'", "for example k8v4"),
        (["--quant", "k3v4"], "k_bits must be one of 1, 2, 4, 8, 16, got 3", "4"),
        (["--quant", "k8v4g3x1"], "k_groups must be one of 1, 2, 4, got 3", "2"),
        (["--quant", "k4v2-k8v4"], "more bits than the high tier", "as in k8v4-k4v2"),
        (["--quant", "k8v4-k4v2-k1v1"], "names 3 tiers", "k8v4-k4v2"),
        (["--alpha-high", "1", "--alpha-low", "2"], "alpha_high must be at least alpha_low", "at"),
        (["--alpha-high", "-1"], "alpha_high must be a number of 0 or more, got -1", "0 or more"),
        (["--alpha-low", "nan"], "alpha_low must be a number of 0 or more, got nan", "0 or more"),
        (["--alpha-high", "inf"], "alpha_high must be a number of 0 or more, got inf", "0 or more"),
        (["--alpha-high", "much"], "--alpha-high: invalid float value: 'much'", "float"),
        (["--window", "0"], "window must be at least 1 token, got 0", "at least 1"),
        (["--window", "9" * 20], "window must be at most 2147483647 tokens, got 999", "at most"),
        (["--segment", "9" * 20], "segment must be at most 2147483647 tokens, got 999", "at most"),
        (["--kernels", "cuda"], "--kernels: invalid choice: 'cuda'", "reference"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag", "vLLM"),
        (["--max-model-len", "999999"], "max_model_len (999999) is greater than", "4096"),
        (["--kv-cache-dtype", "fp8"], "does not support --kv-cache-dtype fp8", "leave it at auto"),
        (["--page-bytes", "10"], "10", "bytes"),
    ],
)
def test_options(
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
    message: str,
    would_work: str,
) -> None:
    start = ["generate", *PROMPT] if command == "generate" else ["serve", "reference"]
    line = refused(capsys, *start, *options)
    assert message in line
    assert would_work.lower() in line.lower()


def test_groups_that_do_not_divide_the_head(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "layout", "--quant", "k4v2g4x4", "--head-dim", "20")
    assert line == "head_dim must be a positive multiple of 8, got 20"


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["generate", *PROMPT, "--model", "/nowhere"], ["serve", "/nowhere"]):
        line = refused(capsys, *command)
        assert line == "model folder /nowhere does not exist: give a folder or a model id"
    assert "give --prompt" in refused(capsys, "generate", "--model", str(tmp_path))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the shipped model, to be broken."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{bad", "config.json is not JSON"),
        ("config.json", b"[]", "config.json has no model_type"),
        ("config.json", b"{}", "config.json has no model_type"),
        ("config.json", b'{"model_type": "no-such-model"}', "no-such-model"),
        ("model.safetensors", None, "has no weights (*.safetensors or *.bin)"),
        ("model.safetensors", b"", "model.safetensors is broken"),
        (
            "model.safetensors",
            b"junk, but more than eight bytes of it",
            "model.safetensors is broken",
        ),
    ],
)
def test_a_broken_model(
    capsys: pytest.CaptureFixture[str], model: Path, file: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_bytes(content)
    line = refused(capsys, "generate", *PROMPT, "--model", str(model))
    assert message in line
    assert message in refused(capsys, "serve", str(model))


def test_weights_that_were_cut_off(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refused(capsys, "generate", *PROMPT, "--model", str(model))
    assert f"{weights} is broken, copy or download it again" in line


def test_a_pool_that_is_too_small_says_how_large_it_must_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ("--max-model-len", "1024", "--max-num-seqs", "8")
    line = refused(capsys, "generate", *PROMPT, *few, "--kv-memory", "100000")
    assert line.startswith("a KV budget of 100000 bytes cannot hold one request of 1024 tokens")
    needed = int(line.split("raise it to ")[1].split()[0])
    assert refused(
        capsys, "serve", "reference", *few, "--kv-cache-memory-bytes", str(needed - 1)
    ).endswith(
        f"raise it to {needed} (--kv-cache-memory-bytes), or lower --max-model-len or "
        f"--max-num-seqs"
    )
    # and that is enough, for a prompt that fills the model too
    prompt = "<bos> " + "w0 " * 1022
    assert (
        main(
            ["generate", "--prompt", prompt, "--max-tokens", "1", *few, "--kv-memory", str(needed)]
        )
        == 0
    )


def test_a_prompt_that_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(
        capsys, "generate", "--prompt", "<bos> k1 v2 ; ? k1", "w0 " * 300, "--max-model-len", "256"
    )
    assert line.startswith("prompt 2 has 300 tokens, but prompt and answer may have 256 together")


def test_sampling_is_checked_before_an_engine_starts(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "generate", *PROMPT, "--temperature", "-1")
    assert line.startswith("temperature must be non-negative, got -1.0")
    assert "--max-tokens must be at least 1, got 0" in refused(
        capsys, "generate", "--prompt", "w0", "--max-tokens", "0"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-transfer-config", "{}"], "DiffKV is the KV connector"),
        (["--kv-transfer-config.kv_connector=X"], "DiffKV is the KV connector"),
        (["--kv-offloading-size", "1"], "DiffKV is the KV connector"),
        (["--attention-backend", "FLASH_ATTN"], "DiffKV is the attention backend"),
        (["--speculative-config={}"], "speculative decoding does not go with DiffKV"),
        (["-sc", "{}"], "speculative decoding does not go with DiffKV"),
        (["--worker_extension_cls", "x.Y"], "DiffKV extends the worker"),
    ],
)
def test_flags_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in refused(capsys, "serve", "reference", *flags)


def test_a_connector_that_vllm_puts_in_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a refusal the cache would be vLLM's own, and nothing would say so."""
    line = refused(capsys, "generate", *PROMPT, "--kv-offloading-size", "1")
    assert line.startswith("DiffKV does not support the KV connector OffloadingConnector")


def test_options_from_python() -> None:
    from diffkv.vllm_plugin import engine_args

    known = "there are quant, alpha_high, alpha_low, drops, window, segment, policy, page_bytes"
    with pytest.raises(ConfigError, match=f"unknown DiffKV option 'alpha': {known}"):
        engine_args(alpha=3)
    for name in ("alpha_high", "alpha_low", "window", "page_bytes"):
        with pytest.raises(ConfigError, match=f"{name} must be a number, got 'x'"):
            engine_args(**{name: "x"})


def test_options_from_vllm_flags() -> None:
    """An option of `kv_connector_extra_config` that does not exist stops the engine."""
    from diffkv.vllm_plugin import engine_args

    transfer = engine_args()["kv_transfer_config"]
    transfer = {**transfer, "kv_connector_extra_config": {"alfa_high": 3}}
    with pytest.raises(ConfigError, match="unknown DiffKV option 'alfa_high'"):
        with engine("k8v4", kv_transfer_config=transfer):
            pass


def test_vllm_that_is_not_supported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.34.1")
    line = "DiffKV works with vLLM 0.33.x and 0.32.x, this is vLLM 0.34.1: install vllm==0.32.0 "
    assert line in refused(capsys, "generate", *PROMPT)
    assert line in refused(capsys, "generate", *PROMPT, "--compare")
    assert line in refused(capsys, "serve", "reference")


def test_no_compiler(tmp_path: Path) -> None:
    """In a process of its own: this one has loaded the kernels."""
    environment = {**os.environ, "CXX": "/nonexistent", "DIFFKV_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "diffkv", "generate", *PROMPT]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("diffkv: ")
    assert "/nonexistent cannot be run" in line
    assert "install g++ (Debian: apt-get install g++) or set CXX" in line
