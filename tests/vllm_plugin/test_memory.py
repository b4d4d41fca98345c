"""Engines of commands ask for the KV memory that they need, and start beside other load."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import make
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.worker import cpu_worker

from diffkv.cli.engine_options import model_folder
from diffkv.vllm_plugin.front.memory import LEAST_BYTES, MOST_BYTES, SPARE, needed_bytes
from diffkv.vllm_plugin.front.offline import generate
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.spec import DividedSpec
from diffkv.vllm_plugin.support import check_config

GIB = 1 << 30


def config_of(max_model_len, max_num_seqs=256):
    config = EngineArgs(model_folder("reference"), dtype="float32").create_engine_config()
    config.model_config.max_model_len = max_model_len
    config.scheduler_config.max_num_seqs = max_num_seqs
    return config


@pytest.mark.parametrize("options", [None, Options(), Options("k16v16")])
def test_it_grows_with_the_requests_between_its_bounds(options):
    config = config_of(2048, max_num_seqs=300)
    assert needed_bytes(config, options, [100]) == LEAST_BYTES
    few, more = (needed_bytes(config, options, [2048] * n) for n in (250, 300))
    assert LEAST_BYTES < few < more < MOST_BYTES
    assert needed_bytes(config, options, [2048] * 1000) == more, "300 run at once"
    assert needed_bytes(config_of(2048, 10**6), options, [2048] * 10**5) == MOST_BYTES


def test_it_holds_the_requests_uncompressed():
    config = config_of(2048)
    bytes_per_token = 2 * 3 * 2 * 64 * 4  # K and V, layers, heads, head_dim, float32
    assert needed_bytes(config, None, [2048] * 200) == int(SPARE * bytes_per_token * 2048 * 200)


def test_one_longest_request_always_fits():
    config = config_of(1 << 21, max_num_seqs=1024)
    num_bytes = needed_bytes(config, Options("k16v16"), [10])
    assert num_bytes > MOST_BYTES
    config.cache_config.kv_cache_memory_bytes = num_bytes
    check_config(config, Options("k16v16"))


def test_one_longest_request_fits_layers_of_two_kinds(tmp_path):
    config = EngineArgs(str(make("gemma3", tmp_path)), dtype="float32").create_engine_config()
    config.model_config.max_model_len = longest = 1 << 20
    options = Options("k16v16")
    kind = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.float32, "block_size": 128}
    layout = options.layout(64, 4)
    full = DividedSpec.of(FullAttentionSpec(**kind), layout, 2, longest, 256, options.segment)
    window = SlidingWindowSpec(**kind, sliding_window=64)
    least = full.least_pool_bytes(longest) + 4 * window.max_memory_usage_bytes(config)
    assert LEAST_BYTES < least < needed_bytes(config, options, [10])


def test_states_take_the_same_whatever_the_length(tmp_path):
    config = EngineArgs(
        str(make("granite_hybrid", tmp_path)), dtype="float32"
    ).create_engine_config()
    config.model_config.max_model_len = longest = 1 << 20
    config.scheduler_config.max_num_seqs = 1024
    layers, block = 2, 128 * 2 * 2 * 32 * 4  # tokens, K and V, heads, head_dim, float32
    state = 4 * 64 * 64 * 4 + 3 * (256 + 2 * 64) * 4
    of_request = layers * -(-state // block) * block
    dense = layers * block // 128
    assert needed_bytes(config, None, [longest]) == int(SPARE * (dense * longest + of_request))
    ours = needed_bytes(config, Options("k16v16"), [longest])
    assert ours == pytest.approx(SPARE * dense * longest, rel=0.1)


@pytest.mark.parametrize("options", [None, Options()])
def test_an_engine_starts_beside_other_load(monkeypatch, options):
    busy = SimpleNamespace(total_memory=64 * GIB, available_memory=GIB)
    monkeypatch.setattr(cpu_worker, "get_memory_node_info", lambda node: busy)
    arguments = {"model": model_folder("reference"), "enforce_eager": True, "max_model_len": 512}
    sampling = [{"temperature": 0.0, "max_tokens": 1}]
    result = generate(["<bos> k1 v2 ; ? k1"], arguments, sampling, options, progress=False)
    assert result.answers[0].text.strip() == "v2"
