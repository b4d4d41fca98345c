"""Models with recurrent states: sizes by config.json, against hand-made numbers, and their plan."""

import json

import pytest
from test_plan import plan, refused

from diffkv.capacity import plan_dense, rank_of
from diffkv.cli import main, models
from diffkv.model_config import ModelConfig
from diffkv.quant import ConfigError
from diffkv.recurrent import States

COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192}
COMMON |= {"hidden_size": 2048, "vocab_size": 100352, "dtype": "bfloat16"}
MAMBA = {"mamba_n_heads": 64, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
MAMBA |= {"mamba_d_conv": 4, "mamba_expand": 2}
GRANITE = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 40,
    "layer_types": (["mamba"] * 9 + ["attention"]) * 4,
    **COMMON,
    **MAMBA,
}
FALCON = {**COMMON, **MAMBA, "model_type": "falcon_h1", "num_hidden_layers": 36}
QWEN = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    **COMMON,
}
OF_MAMBA = ((4096 + 2 * 128) * 3 + 4096 * 128) * 2
OF_LINEAR = ((2 * 16 + 32) * 128 * 3 + 32 * 128 * 128) * 2
GIB = 1 << 30


@pytest.mark.parametrize(
    ("config", "states", "num_full"),
    [
        (GRANITE, States(36, False, OF_MAMBA), 4),
        ({**GRANITE, "layer_types": ["linear_attention"] * 40}, States(40, False, OF_MAMBA), 0),
        (FALCON, States(36, True, OF_MAMBA), 36),
        (
            {**FALCON, "mamba_d_ssm": 1536},
            States(36, True, ((1536 + 256) * 3 + 1536 * 128) * 2),
            36,
        ),
        (QWEN, States(36, False, OF_LINEAR), 12),
        ({**QWEN, "full_attention_interval": 2}, States(24, False, OF_LINEAR), 24),
        (
            {**QWEN, "layer_types": ["linear_attention"] * 47 + ["full_attention"]},
            States(47, False, OF_LINEAR),
            1,
        ),
        (
            {**QWEN, "mamba_ssm_dtype": "float32"},
            States(36, False, OF_LINEAR + 32 * 128 * 128 * 2),
            12,
        ),
    ],
)
def test_sizes(config, states, num_full):
    model = ModelConfig.parse(config, "m")
    assert (model.states, model.num_full) == (states, num_full)


def test_a_state_takes_whole_blocks_and_blocks_are_as_large():
    model = ModelConfig.parse(GRANITE, "m")
    block = 16 * 2 * 8 * 64 * 2
    num_blocks = -(-OF_MAMBA // block)
    rank = rank_of(model, 1, 1, GIB)
    assert rank.state_bytes(16) == 36 * num_blocks * block
    assert rank.block_tokens(16) == 16 * num_blocks
    context = 16 * num_blocks + 1
    in_blocks = 2 * 4 * num_blocks * block
    assert plan_dense("bf16", rank, context).bytes_per_token == (
        (in_blocks + rank.state_bytes(16)) / context
    )
    half = rank_of(model, 1, 2, GIB)
    assert half.state_bytes(16) == 36 * -(-OF_MAMBA // 2 // (block // 2)) * (block // 2)


def test_plan(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GRANITE))
    (tmp_path / "model.bin").write_bytes(bytes(1000))
    flags = ("--gpu-memory", "8GiB", "--context", "8K", "--quant", "k8v4")
    facts = plan(capsys, tmp_path, *flags)
    assert (facts["num_states"], facts["weight_bytes"]) == (36, 1000)
    ours = facts["formats"][-1]
    states = rank_of(ModelConfig.parse(GRANITE, "m"), 1, 1, GIB).state_bytes(16)
    assert ours["state_bytes"] == ours["num_requests"] * states > 0
    assert ours["num_requests"] * ours["bytes_per_token"] * 8192 <= facts["kv_bytes_per_gpu"]
    assert main(["plan", "--model", str(tmp_path), *flags]) == 0
    assert "36 layers with a recurrent state keep vLLM's own cache" in capsys.readouterr().out


def test_refusals(capsys, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(GRANITE))
    line = refused(capsys, "--model", str(tmp_path), "--gpu-memory", "8GiB")
    assert line.endswith("does not say how large the weights are: give a folder that has them")
    index = tmp_path / "index.json"
    index.write_text('{"metadata": {"total_size": 123}}')
    monkeypatch.setattr(models, "_hub_file", lambda model, file: index)
    assert models.weights_of("owner/name", ModelConfig.parse(GRANITE, "m")).num_bytes == 123
    with pytest.raises(ConfigError, match="has no 'mamba_d_state', a state's size"):
        ModelConfig.parse({k: v for k, v in GRANITE.items() if k != "mamba_d_state"}, "m")
    with pytest.raises(ConfigError, match="has a bad size of a state: invalid literal"):
        ModelConfig.parse({**GRANITE, "mamba_expand": "x"}, "m")
    minimax = {"attn_type_list": [0, 0, 0, 1]}
    full = ModelConfig.parse({**COMMON, "num_hidden_layers": 4, "attn_type_list": [1] * 4}, "m")
    assert full.num_full == 4
    for own in ({"mamba_dt_rank": 4}, minimax):
        model = ModelConfig.parse({**COMMON, "num_hidden_layers": 4, **own}, "m")
        with pytest.raises(ConfigError, match="recurrent states of a kind of its own"):
            rank_of(model, 1, 1, GIB)
