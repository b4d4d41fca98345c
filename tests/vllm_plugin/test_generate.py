"""`diffkv generate` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffkv.cli import main
from diffkv.quant import DEFAULT_QUANT

SHIPPED = Path(__file__).parents[2] / "src" / "diffkv" / "data" / "prompts.jsonl"
OUTPUT_KEYS = {"prompt_tokens", "token_ids", "text", "finish_reason"}
CACHE_KEYS = {
    "quant",
    "alpha_high",
    "alpha_low",
    "tokens",
    "high",
    "low",
    "dropped",
    "pages_peak",
    "page_bytes",
    "bytes_per_token",
    "bf16_bytes_per_token",
    "ratio_bf16",
    "nominal_ratio_bf16",
}
NUM_HEADS = 3 * 2
WINDOW = 64
BF16_BYTES = NUM_HEADS * 64 * 2 * 2


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """In this process, which has imported vLLM already."""
    assert main(["generate", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check_arithmetic(cache: dict[str, Any]) -> None:
    assert cache["high"] + cache["low"] + cache["dropped"] == pytest.approx(cache["tokens"])
    per_token, bf16 = cache["bytes_per_token"], cache["bf16_bytes_per_token"]
    assert bf16 == BF16_BYTES
    assert per_token * cache["ratio_bf16"] == pytest.approx(bf16)
    assert cache["ratio_fp8"] == pytest.approx(cache["ratio_bf16"] / 2)
    # real bytes are pages, and the tables and ring entries that go with them
    pages_bytes, num_bytes = cache["pages"] * cache["page_bytes"], per_token * cache["tokens"]
    assert pages_bytes <= num_bytes < 1.2 * pages_bytes
    assert cache["ratio_bf16"] < cache["nominal_ratio_bf16"]
    assert 0 < cache["pages_peak"]


@pytest.fixture(scope="class")
def process() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffkv", "generate", "--compare", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="class")
def result(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


class TestDefaults:
    """The command that `make run` shows, in a process of its own."""

    def test_console_is_quiet(self, process: subprocess.CompletedProcess[str]) -> None:
        assert process.stderr.strip() == ""
        assert len(process.stdout.splitlines()) == 1

    def test_answers_equal_stock_and_are_right(self, result: dict[str, Any]) -> None:
        assert result["outputs"] == result["stock_outputs"]
        answers = [json.loads(line)["answer"] for line in SHIPPED.read_text().splitlines()]
        assert [output["text"].split() for output in result["outputs"]] == [
            answer.split() for answer in answers
        ]

    def test_form(self, result: dict[str, Any]) -> None:
        assert set(result) == {"outputs", "stock_outputs", "cache"}
        assert all(set(output) == OUTPUT_KEYS for output in result["outputs"])
        assert set(result["cache"]) >= CACHE_KEYS
        for output in result["outputs"]:
            assert 1000 < output["prompt_tokens"] < 1100
            assert output["finish_reason"] == "length"
            assert len(output["token_ids"]) == len(output["text"].split())

    def test_cache(self, result: dict[str, Any]) -> None:
        cache = result["cache"]
        check_arithmetic(cache)
        assert cache["ratio_bf16"] >= 3.0
        assert cache["quant"] == DEFAULT_QUANT
        assert cache["preemptions"] == 0
        # the last new token of a request is never fed back to the cache
        expected = sum(o["prompt_tokens"] + len(o["token_ids"]) - 1 for o in result["outputs"])
        assert cache["tokens"] == expected


def test_prompt_and_flags_of_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(f"k{i} v{i} ;" for i in range(60))
    result = run(
        capsys,
        "--prompt",
        f"<bos> {words} ? k17",
        f"<bos> {words} ? k3",
        "--max-tokens",
        "40",
        "--ignore-eos",
        "--dtype",
        "float32",
        "--max-num-batched-tokens",
        "64",
        "--max-model-len",
        "512",
        "--quant",
        "k8v8",
        "--kv-memory",
        str(8 << 20),
    )
    assert [output["prompt_tokens"] for output in result["outputs"]] == [183, 183]
    assert all(len(output["token_ids"]) == 40 for output in result["outputs"])
    assert [output["text"].split()[0] for output in result["outputs"]] == ["v17", "v3"]
    cache = result["cache"]
    check_arithmetic(cache)
    assert (cache["quant"], cache["low"], cache["dropped"]) == ("k8v8", 0, 0)
    assert cache["tokens"] == 2 * (183 + 39)
    assert "stock_outputs" not in result


def test_prompts_file_and_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Plain lines and JSON lines may be mixed; a known answer is compared with."""
    file = tmp_path / "prompts.txt"
    row = {"prompt": "<bos> k1 v2 ; k3 v4 ; ? k3", "answer": "v4 ;"}
    wrong = {"prompt": "<bos> k1 v2 ; k3 v4 ; ? k1", "answer": "v4 ;"}
    file.write_text(
        f"<bos> k5 v6 ; k7 v8 ; ? k5\n\n{json.dumps(row)}\n{json.dumps(wrong)}\n", encoding="utf-8"
    )
    assert main(["generate", "--prompts", str(file), "--max-tokens", "2"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if " ; " in line or "v6 ;" in line]
    assert len(rows) == 3, out
    assert "v6 ;" in rows[0] and "yes" not in rows[0] and "no" not in rows[0]
    assert "v4 ;" in rows[1] and "yes" in rows[1]
    assert "v2 ;" in rows[2] and "no" in rows[2]
    assert DEFAULT_QUANT in out
    assert "smaller than bf16" in out
    assert "high, low, dropped" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read --prompts"),
        ("", "holds no prompt"),
        ("\n \n", "holds no prompt"),
        ('a\n{"prompt": "x"\n', 'line 2 is no JSON object with "prompt"'),
        ('{"text": "x"}\n', 'line 1 is no JSON object with "prompt"'),
    ],
)
def test_prompts_files_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    if text is not None:
        file.write_text(text)
    assert main(["generate", "--prompts", str(file)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert err[0].startswith("diffkv: ")
    assert message in err[0]


def test_a_missing_file_and_a_folder_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["generate", "--prompts", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["generate", "--prompts", "/nowhere/p.txt"]) == 2
    assert "/nowhere/p.txt" in capsys.readouterr().err


def test_policy_that_looks_at_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Every head drops a quarter of a prompt, but for what is high; answers stay right."""
    published = run(capsys)
    result = run(capsys, "--policy", "paper:distinct=0.75")
    prompt_tokens = [output["prompt_tokens"] for output in result["outputs"]]
    most = sum(0.25 * (num_tokens - WINDOW) for num_tokens in prompt_tokens)
    cache = result["cache"]
    assert 0.8 * most < cache["dropped"] <= most + len(prompt_tokens)
    assert cache["high"] == pytest.approx(published["cache"]["high"], rel=0.05)
    assert cache["ratio_bf16"] > 1.15 * published["cache"]["ratio_bf16"]
    assert [o["text"] for o in result["outputs"]] == [o["text"] for o in published["outputs"]]
