"""The command line, as a user's shell sees it."""

import json
import subprocess
import sys

import pytest
from rich.text import Text

from diffkv import __version__
from diffkv.cli import COMMANDS, main
from diffkv.cli.tables import short
from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig


def diffkv(*arguments):
    command = [sys.executable, "-m", "diffkv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def layout_json(capsys, *arguments):
    assert main(["layout", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_layout_prints_a_table():
    result = diffkv("layout", "--quant", "k8v4-k4v2", "--head-dim", "128")
    assert result.returncode == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "k8v4-k4v2 at head_dim 128, bfloat16: pages of 3328 bytes"
    assert lines[3].split() == ["high", "k8v4", "16", "208.0", "208", "0.0%", "40.6%", "37.5%"]
    assert lines[4].split() == ["low", "k4v2", "32", "104.0", "104", "0.0%", "20.3%", "18.8%"]


def test_layout_json_is_one_object_with_every_fact():
    result = diffkv("layout", "--json", "--drops", "--quant", "k8v4-k4v2")
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    facts = json.loads(result.stdout)
    assert list(facts) == ["quant", "head_dim", "page_bytes", "element_bytes", "drops", "tiers"]
    assert [facts[k] for k in ("quant", "head_dim", "page_bytes", "element_bytes")] == [
        "k8v4-k4v2",
        128,
        3584,
        2,
    ]
    high, low = facts["tiers"]
    regions = {
        "k_codes": {"offset": 0, "bytes": 2048},
        "k_meta": {"offset": 2048, "bytes": 128},
        "v_codes": {"offset": 2176, "bytes": 1024},
        "v_meta": {"offset": 3200, "bytes": 128},
        "sums": {"offset": 3328, "bytes": 128},
        "positions": {"offset": 3456, "bytes": 128},
    }
    assert low == {
        "tier": "low",
        "format": "k4v2",
        "tokens_per_page": 32,
        "bytes_per_token": 112.0,
        "token_bytes": 112,
        "unused_share": 0.0,
        "ratio_bf16": 112 / 512,
        "nominal_ratio_bf16": (4 + 2) / 32,
        "regions": regions,
    }
    assert list(high) == list(low)
    assert list(high["regions"]) == list(regions)
    assert high["bytes_per_token"] == 3584 / 17


@pytest.mark.parametrize("quant", ["k16v16", "k8v4", "k8v4g1x2-k4v2g2x4"])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_layout_json_agrees_with_the_layout(capsys, quant, head_dim):
    facts = layout_json(capsys, "--quant", quant, "--head-dim", str(head_dim))
    layout = PageLayout.derive(QuantConfig.parse(quant), head_dim)
    assert facts["page_bytes"] == layout.page_bytes
    assert [tier["tier"] for tier in facts["tiers"]] == ["high", "low"][: len(layout.tiers)]
    for told, tier in zip(facts["tiers"], layout.tiers, strict=True):
        assert told["format"] == str(tier.format)
        assert told["tokens_per_page"] == tier.tokens_per_page
        assert told["nominal_ratio_bf16"] == tier.format.nominal_bits / 16
        last = told["regions"]["positions"]
        assert last["offset"] + last["bytes"] == tier.end


def test_layout_of_a_float32_model(capsys):
    facts = layout_json(capsys, "--quant", "k16v16-k8v4", "--dtype", "float32")
    assert facts["element_bytes"] == 4
    assert facts["tiers"][0]["token_bytes"] == 2 * 128 * 4 + 8
    assert facts["tiers"][0]["nominal_ratio_bf16"] == 2.0
    assert facts["tiers"][1]["token_bytes"] == 200  # codes do not depend on the dtype


def test_layout_takes_a_page_size(capsys):
    facts = layout_json(capsys, "--page-bytes", "6784", "--drops")
    assert [tier["tokens_per_page"] for tier in facts["tiers"]] == [24, 60]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quant", "k8v4-k3v2"], "k_bits must be one of 1, 2, 4, 8, 16, got 3"),
        (["--quant", "k8v4-k8v4"], "both tiers of k8v4-k8v4 are the same: write one format, k8v4"),
        (["--head-dim", "100"], "head_dim must be a positive multiple of 8, got 100"),
        (
            ["--quant", "k8v8-k8v4", "--page-bytes", "256"],
            "no k8v8 token fits a page of 256 bytes at head_dim 128: one token needs 296 bytes",
        ),
        (["--page-bytes", "7"], "page_bytes must be a multiple of 32 up to 1048576, got 7"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(arguments, message):
    result = diffkv("layout", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"diffkv: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        (["layout", "--qant", "k8v4"], "unrecognized arguments: --qant k8v4", "diffkv layout"),
        (["layout", "--qua", "k8v4"], "unrecognized arguments: --qua k8v4", "diffkv layout"),
        (["layout", "k8v4"], "unrecognized arguments: k8v4", "diffkv layout"),
        (
            ["layout", "--head-dim", "x"],
            "argument --head-dim: invalid int value: 'x'",
            "diffkv layout",
        ),
        (["layout", "--quant"], "argument --quant: expected one argument", "diffkv layout"),
        (["--versions"], "unrecognized arguments: --versions", "diffkv"),
        ([], f"name a command: {', '.join(COMMANDS)}", "diffkv"),
    ],
)
def test_what_is_not_known_is_refused_with_a_hint(capsys, arguments, message, command):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [f"diffkv: {message}", f"Try '{command} --help'."]


def test_an_unknown_command_is_refused_with_the_known_ones():
    result = diffkv("lay")
    assert result.returncode == 2
    first, hint = result.stderr.splitlines()
    assert "'lay'" in first
    assert all(command in first for command in COMMANDS)
    assert hint == "Try 'diffkv --help'."


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"diffkv {__version__}\n"


def test_help_names_every_command():
    result = diffkv("--help")
    assert result.returncode == 0
    for command, line in COMMANDS.items():
        assert f"  {command} " in result.stdout
        assert line in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = diffkv(command, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: diffkv {command} ")
    assert COMMANDS[command] in result.stdout


@pytest.mark.parametrize("arguments", [["layout"], ["layout", "--json"], ["--help"], ["--version"]])
def test_no_engine_is_imported_for_a_table(arguments):
    script = (
        "import sys; from diffkv.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


BY_LAYER = "0-3:k8v8,4-:k8v4-k4v2"


@pytest.mark.parametrize(
    "arguments",
    [
        ["layout"],
        ["plan", "--model", "reference", "--gpu-memory", "80GiB"],
        *(["generate"], ["inspect"], ["serve", "reference"], ["eval"]),
        ["calibrate", "--data", "synth", "--max-loss", "0.01", "--out", "c.toml"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_formats_by_layer_are_refused(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--quant", BY_LAYER]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"diffkv: formats by layer, as in '{BY_LAYER}', are not supported: they gain nothing over one "
        f"configuration of the same bytes; name one for all layers, as in k8v4-k4v2"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["layout", "--quant", "k8v4", "--quant", "k16v16"],
            "--quant is given twice, with k8v4 and k16v16",
        ),
        # the first of them is the default, and small numbers are one object
        (
            ["layout", "--head-dim", "128", "--head-dim=64"],
            "--head-dim is given twice, with 128 and 64",
        ),
        (
            ["bench", "attention", "--device", "cpu", "--device", "cuda"],
            "--device is given twice, with cpu and cuda",
        ),
        (
            ["generate", "--max-tokens", "5", "--max-tokens", "6"],
            "--max-tokens is given twice, with 5 and 6",
        ),
        (
            ["serve", "reference", "--window", "64", "--window", "65"],
            "--window is given twice, with 64 and 65",
        ),
        (["generate", "--drops", "--no-drops"], "--drops and --no-drops are both given"),
    ],
)
def test_one_value_given_twice_is_refused(capsys, arguments, message):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"diffkv: {message}: keep one\n"


def test_the_same_value_twice_is_one(capsys):
    twice = ["--quant", "k8v4", "--quant=k8v4", "--json", "--json"]
    assert layout_json(capsys, *twice)["quant"] == "k8v4"
    assert layout_json(capsys, "--quant", "k8v8")["quant"] == "k8v8"


def test_answers_are_shown_as_they_are():
    """A model may say what the terminal's library takes for markup."""
    said = "a[b] is [/INST]\n[red]"
    assert Text.from_markup(short(said, 48)).plain == "a[b] is [/INST] [red]"
    assert Text.from_markup(short(said, 8)).plain == "a[b] is…"
