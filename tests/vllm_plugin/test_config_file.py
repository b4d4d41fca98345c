"""`--config FILE`: what conflicts with the command is refused in a line, the rest has its effect."""

import pytest

from diffkv.cli import main
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.front.offline import engine_flags

CONFLICTS = {
    "model: other": "name the model on the command line only",
    "quant: k8v8": "give --quant instead",
    "alpha_high: 3": "give --alpha-high instead",
    "max-num-seqs: 2\nmax_num_seqs: 3": "sets max-num-seqs 2 times",
    "enforce-eager: true\nno-enforce-eager: true": "both enforce-eager and no-enforce-eager",
    "config: more.yaml": "names another file",
    "- a\n- b": "must hold lines of the form",
    "": "must hold lines of the form",
    "a: [": "is not YAML",
    "no-such-option: 1": "neither an option of diffkv nor of vLLM's engine",
}


@pytest.fixture
def config(tmp_path):
    def write(text):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return str(file)

    return write


def test_its_lines_are_flags_that_the_command_line_overrides(config):
    file = config("max-num-seqs: 7\ndtype: float32\nenforce-eager: true\n")
    expected = {"max_num_seqs": 9, "dtype": "float32", "enforce_eager": True}
    assert engine_flags(["--config", file, "--max-num-seqs", "9"]) == expected
    assert engine_flags(["--max-num-seqs", "9", f"--config={file}"]) == expected


def test_what_is_given_counts_also_where_it_is_vllms_default(config):
    """The commands have defaults of their own, which it overrides."""
    assert engine_flags([]) == {}
    flags = ["--no-enforce-eager", "--watermark", "0", "--gpu-memory-utilization", "0.92"]
    expected = {"enforce_eager": False, "watermark": 0.0, "gpu_memory_utilization": 0.92}
    assert engine_flags(flags) == expected
    assert engine_flags(["--config", config("enforce-eager: false\n")]) == {"enforce_eager": False}


@pytest.mark.parametrize("text", CONFLICTS)
def test_a_conflict_is_refused(config, text):
    with pytest.raises(ConfigError, match=CONFLICTS[text]):
        engine_flags(["--config", config(text)])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("kv-transfer-config:\n  kv_connector: Other", "DiffKV is the KV connector"),
        ("attention-backend: FLASH_ATTN", "DiffKV is the attention backend"),
        ("model: other", "name the model on the command line only"),
    ],
)
def test_a_server_refuses_lines_that_would_undo_diffkv(config, capsys, text, reason):
    assert main(["serve", "reference", "--config", config(text)]) == 2
    assert reason in capsys.readouterr().err


def test_a_server_refuses_a_second_model(capsys):
    assert main(["serve", "reference", "--model", "other"]) == 2
    assert "first argument" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["other"], ["--enforce-eager", "true"]])
def test_a_server_refuses_a_word_that_vllm_would_take_for_its_model(capsys, flags):
    assert main(["serve", "reference", *flags]) == 2
    assert f"{flags[-1]!r} is one word too many" in capsys.readouterr().err


def test_a_server_refuses_other_front_ends(capsys, monkeypatch):
    assert main(["serve", "reference", "--grpc"]) == 2
    assert "--grpc" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert main(["serve", "reference"]) == 2
    assert "VLLM_USE_RUST_FRONTEND" in capsys.readouterr().err


def test_a_server_refuses_what_only_vllms_command_looks_at(capsys):
    assert main(["serve", "reference", "--headless", "--api-server-count", "2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "refuses" in line]
    assert "cannot be used with --headless" in line


@pytest.mark.parametrize("flag", ["--worker-ext=foo.Bar", "--kv-transfer-conf={}"])
def test_a_server_refuses_flags_that_are_cut_short(capsys, flag):
    assert main(["serve", "reference", flag]) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


def test_more_than_one_file_or_none_is_refused(config):
    file = config("dtype: float32")
    with pytest.raises(ConfigError, match="2 times"):
        engine_flags(["--config", file, "--config", file])
    for flags, reason in (
        (["--config"], "needs the name"),
        (["--config", "missing.yaml"], "cannot read"),
        (["--config", "file.json"], "must be a YAML file"),
    ):
        with pytest.raises(ConfigError, match=reason):
            engine_flags(flags)


def test_one_memory_is_given_once(capsys):
    line = ["generate", "--prompt", "a", "--kv-memory", "1G", "--kv-cache-memory-bytes", "1G"]
    assert main(line) == 2
    assert "one option" in capsys.readouterr().err
