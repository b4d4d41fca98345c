"""Which layers have which backend on a GPU, and how memory is divided there, without one (`hopper`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hopper import KV_BYTES
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from diffkv.quant import ConfigError
from diffkv.vllm_plugin.front.offline import engine_arguments
from diffkv.vllm_plugin.front.server import serve_flags
from diffkv.vllm_plugin.options import Options

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
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


FAMILIES = ("gemma3", "llama4", "granite_head64", "falcon_h1", "qwen3_next")


@pytest.fixture(scope="module")
def described() -> dict[str, dict[str, Any]]:
    """What one process has found, by family."""
    done = run(*FAMILIES, "--quant", "k8v4-k4v2")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()[-len(FAMILIES) :]
    return dict(zip(FAMILIES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize(
    ("family", "layers", "others_builder", "graphs"),
    [
        pytest.param(
            "gemma3",
            [WINDOW, WINDOW, OURS] * 2,
            "FlashAttentionMetadataBuilder",
            "UNIFORM_SINGLE_TOKEN_DECODE",
            id="windows",
        ),
        pytest.param(
            "llama4",
            [chunks("Flash"), OURS] * 2,
            "ChunkedLocalAttentionBuilder of FlashAttentionMetadataBuilder",
            "NEVER",
            id="chunks",
        ),
        pytest.param(
            "falcon_h1",
            [OURS, MAMBA] * 2,
            "Mamba2AttentionMetadataBuilder",
            "UNIFORM_SINGLE_TOKEN_DECODE",
            id="states",
        ),
        pytest.param(
            "qwen3_next",
            [states("QwenGatedDeltaNetAttention", "GDN"), OURS] * 2,
            "GDNAttentionMetadataBuilder",
            "UNIFORM_SINGLE_TOKEN_DECODE",
            id="linear attention",
        ),
    ],
)
def test_only_layers_with_full_attention_are_ours(
    described: dict[str, dict[str, Any]],
    family: str,
    layers: list[list[str]],
    others_builder: str,
    graphs: str,
) -> None:
    found = described[family]
    assert found["layers"] == layers
    builders = {tuple(group[:2]): " of ".join(group[2:]) for group in found["groups"]}
    assert builders.pop(("DividedSpec", "CudaBackend")).startswith("DiffKVBuilder of ")
    assert all(each.startswith(others_builder) for each in builders.values()) and builders
    assert found["graphs"] == graphs
    # what vLLM allocates is its part only, in one piece
    assert found["allocated"] == [found["blocks_bytes"]]
    assert 0 < found["pool_bytes"] <= KV_BYTES - found["blocks_bytes"]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_planned_as_vllm_keeps_them(
    described: dict[str, dict[str, Any]], family: str
) -> None:
    found = described[family]
    assert found["planned_state_bytes"] == found["state_bytes"]
    assert (found["state_bytes"] > 0) == (family in ("falcon_h1", "granite_head64", "qwen3_next"))


def test_the_backend_for_all_layers_says_what_to_pass() -> None:
    done = run("gemma3", "--attention-backend", "CUSTOM")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "pass --attention-config.backend_per_kind.full_attention CUSTOM" in last


BACKENDS = {"full_attention": AttentionBackendEnum.CUSTOM}


def test_settings_of_attention_can_be_given_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    given = AttentionConfig(
        flash_attn_version=3, backend_per_kind={"sliding_window": "TRITON_ATTN"}
    )
    for asked in (given, {"flash_attn_version": 3, "backend_per_kind": given.backend_per_kind}):
        config = engine_arguments({"attention_config": asked}, Options())["attention_config"]
        assert config.flash_attn_version == 3
        assert config.backend_per_kind == {**given.backend_per_kind, **BACKENDS}
    assert given.backend_per_kind.keys() == {"sliding_window"}
    alone = engine_arguments({}, Options())["attention_config"]
    assert AttentionConfig(**alone).backend_per_kind == BACKENDS
    for other in (
        {"backend": "FLASH_ATTN"},
        {"backend_per_kind": {"full_attention": "FLASH_ATTN"}},
    ):
        with pytest.raises(ConfigError, match="DiffKV is the attention backend"):
            engine_arguments({"attention_config": other}, Options())


def test_flags_of_a_plain_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    flags = serve_flags(Options())[-2:]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args([*flags, "--attention-config.flash_attn_version=3"])
    assert args.attention_config.backend_per_kind == BACKENDS
    assert args.attention_config.flash_attn_version == 3
