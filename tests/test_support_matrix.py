"""The table of what goes with DiffKV: its page, its tests, its refusals."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffkv.quant import ConfigError
from diffkv.vllm_plugin import matrix
from diffkv.vllm_plugin.matrix import MATRIX
from diffkv.vllm_plugin.matrix_row import NOT_TRIED, REFUSED, TRIED, WORKS

ROOT = Path(__file__).parents[1]


NUM_LAYERS = 6
SOME_WINDOWS = SimpleNamespace(
    sliding_window=4096, layer_types=["sliding_attention", "full_attention"] * 3
)


def vllm_config(**changes):
    """A configuration that asks for nothing special, with `section.field` changed."""
    sections = {
        "model_config": {
            "use_mla": False,
            "is_hybrid": False,
            "is_encoder_decoder": False,
            "runner_type": "generate",
            "disable_sliding_window": False,
            "hf_config": SimpleNamespace(),
            "hf_text_config": SimpleNamespace(sliding_window=None),
            "is_mm_prefix_lm": False,
            "enable_sleep_mode": False,
            "is_attention_free": False,
            "dtype": "torch.float32",
            "get_num_layers": lambda parallel: NUM_LAYERS,
        },
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
            "enable_expert_parallel": False,
        },
        "device_config": {"device_type": "cpu"},
        "cache_config": {"cache_dtype": "auto"},
        "kv_transfer_config": {
            "kv_connector": "DiffKVConnector",
            "kv_load_failure_policy": "fail",
        },
        "aux_output_config": {"enabled": False},
        "kv_events_config": {"enable_kv_cache_events": False},
    }
    speculative = changes.pop("speculative", None)
    for name, value in changes.items():
        section = next(fields for fields in sections.values() if name in fields)
        section[name] = value
    configs = {name: SimpleNamespace(**fields) for name, fields in sections.items()}
    return SimpleNamespace(speculative_config=speculative, **configs)


ON_GPUS = {
    "sliding windows in some layers (Gemma 3), on a GPU": {"hf_text_config": SOME_WINDOWS},
    "chunked local attention in some layers (Llama 4), on a GPU": {
        "hf_text_config": SimpleNamespace(
            attention_chunk_size=8192, layer_types=["chunked_attention", "full_attention"] * 3
        )
    },
    "recurrent states beside full attention (Granite 4, Falcon-H1), on a GPU": {"is_hybrid": True},
    "linear attention beside full attention (Qwen3-Next), on a GPU": {
        "hf_text_config": SimpleNamespace(linear_key_head_dim=64, layer_types=["full_attention"]),
        "is_hybrid": True,
    },
}
"""Models with layers of other kinds, each of which was run there."""

REFUSALS = {
    "sliding windows in all layers (Mistral 7B v0.1)": {
        "hf_text_config": SimpleNamespace(sliding_window=4096)
    },
    "one kind of cache for layers of several kinds": {
        "hf_text_config": SOME_WINDOWS,
        "disable_hybrid_kv_cache_manager": True,
    },
    "attention in both directions over images (PaliGemma)": {"is_mm_prefix_lm": True},
    "MLA": {"use_mla": True},
    "Mamba's first version beside full attention (Jamba), on a CPU": {
        "hf_text_config": SimpleNamespace(sliding_window=None, mamba_dt_rank=4)
    },
    "linear attention (Qwen3-Next) on a CPU in another dtype than bfloat16": {
        "hf_text_config": SimpleNamespace(sliding_window=None, linear_key_head_dim=64)
    },
    "recurrent states in all layers (Mamba)": {"is_attention_free": True},
    "ALiBi": {"hf_text_config": SimpleNamespace(sliding_window=None, model_type="bloom")},
    "soft cap on attention scores": {
        "hf_text_config": SimpleNamespace(sliding_window=None, attn_logit_softcapping=50.0)
    },
    "attention sinks as parameters (gpt-oss)": {
        "hf_text_config": SimpleNamespace(sliding_window=None, model_type="gpt_oss")
    },
    "encoder-decoder models": {"is_encoder_decoder": True},
    "models that do not generate": {"runner_type": "pooling"},
    "speculative decoding": {"speculative": object()},
    "kv_cache_dtype other than auto": {"cache_dtype": "fp8"},
    "another KV connector": {"kv_connector": "OffloadingConnector"},
    "requests that are computed again where they are too large": {
        "kv_load_failure_policy": "recompute"
    },
    "routed experts in answers (--enable-return-routed-experts)": {"enabled": True},
    "KV cache events (--kv-events-config)": {"enable_kv_cache_events": True},
    "sleep mode": {"enable_sleep_mode": True},
    "pipeline parallelism": {"pipeline_parallel_size": 2},
    "context parallelism": {"decode_context_parallel_size": 2},
    "int4 weights, on a CPU without AVX-512": {
        "hf_config": SimpleNamespace(quantization_config={"quant_method": "awq", "bits": 4})
    },
    "expert parallelism on CPUs": {"enable_expert_parallel": True},
    "micro-batches (--enable-dbo)": {"use_ubatching": True},
}


def test_nothing_special_is_not_refused():
    matrix.refuse(vllm_config())
    unused = SimpleNamespace(sliding_window=4096, use_sliding_window=False)
    matrix.refuse(vllm_config(hf_text_config=unused))
    matrix.refuse(vllm_config(hf_text_config=SOME_WINDOWS))
    matrix.refuse(vllm_config(is_hybrid=True))
    windowed = SimpleNamespace(sliding_window=4096)
    matrix.refuse(vllm_config(hf_text_config=windowed, disable_sliding_window=True))


@pytest.mark.parametrize("feature", ON_GPUS)
def test_what_works_on_a_gpu_is_not_refused_there(feature):
    assert feature in {row.feature for row in MATRIX if row.status == WORKS}
    matrix.refuse(vllm_config(**ON_GPUS[feature], device_type="cuda"))


def test_every_predicate_is_tested():
    assert {row.feature for row in MATRIX if row.asked is not None} == set(REFUSALS)


@pytest.mark.parametrize("feature", REFUSALS)
def test_refusals(feature, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: False)
    (row,) = (row for row in MATRIX if row.feature == feature)
    with pytest.raises(ConfigError) as refused:
        matrix.refuse(vllm_config(**REFUSALS[feature]))
    line = str(refused.value)
    assert line.startswith("DiffKV does not support ")
    assert line.endswith(f": {row.change}")
    assert "\n" not in line and "{" not in line
    if feature == "kv_cache_dtype other than auto":
        assert "--kv-cache-dtype fp8" in line


@pytest.mark.parametrize(("bits", "refused"), [(4, True), (8, False)])
def test_int4_of_compressed_tensors(bits, refused, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: False)
    groups = {"group_0": {"weights": {"num_bits": bits}}}
    quantised = {"quant_method": "compressed-tensors", "config_groups": groups}
    config = vllm_config(hf_config=SimpleNamespace(quantization_config=quantised))
    with pytest.raises(ConfigError, match="int4") if refused else nullcontext():
        matrix.refuse(config)


@pytest.mark.parametrize("name", [row.layer_argument for row in MATRIX if row.layer_argument])
def test_layer_refusals(name):
    support = pytest.importorskip("diffkv.vllm_plugin.support", reason="needs vLLM")
    support.check_layer(**{name: None})
    (row,) = (row for row in MATRIX if row.layer_argument == name)
    with pytest.raises(ConfigError) as refused:
        support.check_layer(**{name: 7})
    assert str(refused.value) == (
        f"DiffKV does not support attention layers with {name} (7): {row.change}"
    )


def test_every_claim_names_a_test_that_exists():
    for row in MATRIX:
        assert bool(row.tests) == (row.status not in (TRIED, NOT_TRIED)), row.feature
        for test in row.tests:
            file, function = test.split("::")
            source = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^ *def {function}\(", source, re.M), test


def test_rows_are_whole():
    assert {row.status for row in MATRIX} == {WORKS, REFUSED, TRIED, NOT_TRIED}
    features = [(row.area, row.feature) for row in MATRIX]
    assert len(set(features)) == len(features)
    for row in MATRIX:
        assert bool(row.change) == (row.status == REFUSED), row.feature
        assert row.asked is None or row.status == REFUSED


def test_page_is_up_to_date():
    page = (ROOT / "docs" / "support-matrix.md").read_text(encoding="utf-8")
    assert page == matrix.to_markdown(), "run python tools/support_matrix.py"
