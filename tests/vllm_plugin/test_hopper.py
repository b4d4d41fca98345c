"""Which layers have which backend on a GPU, and how memory is divided there, without one (`hopper`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hopper import KV_BYTES

OURS = ["Attention", "CudaBackend", "DiffKVImpl"]
WINDOW = ["Attention", "FlashAttentionBackend", "FlashAttentionImpl"]


def chunks(name: str) -> list[str]:
    return [
        "ChunkedLocalAttention",
        "ChunkedLocalAttention_128_CudaBackend",
        f"Local{name}AttentionImpl",
    ]


def states(layer: str, backend: str) -> list[str]:
    return [layer, f"{backend}AttentionBackend", "NoneType"]


MAMBA = states("MambaMixer2", "Mamba2")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("hopper.py")), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.parametrize(
    ("args", "layers", "others_builder", "graphs"),
    [
        pytest.param(
            ["gemma3"],
            [WINDOW, WINDOW, OURS] * 2,
            "FlashAttentionMetadataBuilder",
            "UNIFORM_SINGLE_TOKEN_DECODE",
            id="windows",
        ),
        pytest.param(
            ["llama4"],
            [chunks("Flash"), OURS] * 2,
            "ChunkedLocalAttentionBuilder of FlashAttentionMetadataBuilder",
            "NEVER",
            id="chunks",
        ),
        pytest.param(
            ["falcon_h1"],
            [OURS, MAMBA] * 2,
            "Mamba2AttentionMetadataBuilder",
            "UNIFORM_SINGLE_TOKEN_DECODE",
            id="states",
        ),
        pytest.param(
            ["qwen3_next"],
            [states("QwenGatedDeltaNetAttention", "GDN"), OURS] * 2,
            "GDNAttentionMetadataBuilder",
            "UNIFORM_SINGLE_TOKEN_DECODE",
            id="linear attention",
        ),
    ],
)
def test_only_layers_with_full_attention_are_ours(
    args: list[str], layers: list[list[str]], others_builder: str, graphs: str
) -> None:
    done = run(*args, "--quant", "k8v4-k4v2")
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == layers
    builders = {tuple(group[:2]): " of ".join(group[2:]) for group in found["groups"]}
    assert builders.pop(("DividedSpec", "CudaBackend")).startswith("DiffKVBuilder of ")
    assert all(each.startswith(others_builder) for each in builders.values()) and builders
    assert found["graphs"] == graphs
    # what vLLM allocates is its part only, in one piece
    assert found["allocated"] == [found["blocks_bytes"]]
    assert 0 < found["pool_bytes"] <= KV_BYTES - found["blocks_bytes"]


def test_the_backend_for_all_layers_says_what_to_pass() -> None:
    done = run("gemma3", "--attention-backend", "CUSTOM")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "pass --attention-config.backend_per_kind.full_attention CUSTOM" in last
