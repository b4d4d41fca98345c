"""`diffkv plan`: sizes of known models, what fits, and the verdict, against hand-made numbers."""

import json

import pytest
from test_presets import config_json

from diffkv.capacity import HIGH_SHARE, Mix, plan_format, rank_of
from diffkv.cli import main
from diffkv.layout import PageLayout
from diffkv.model_config import ModelConfig, stored_weight_bytes
from diffkv.quant import ConfigError, QuantConfig
from diffkv.segments import SEGMENT
from diffkv.shape import FIXED_BYTES, MORE_ROWS, PoolShape, suitable_leaf_entries

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
GIB = 1 << 30


@pytest.fixture
def llama(tmp_path):
    path = tmp_path / "llama"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_json("Meta-Llama-3-8B-Instruct")))
    return path


def plan(capsys, model, *arguments):
    assert main(["plan", "--model", str(model), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("diffkv: ")


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        # as the models' cards on the Hub count them
        (config_json("Meta-Llama-3-8B-Instruct"), 8_030_261_248),
        (config_json("Meta-Llama-3-70B"), 70_553_706_496),
        (config_json("Qwen2.5-7B-Instruct"), 7_615_616_512),
        (config_json("Qwen2.5-32B"), 32_763_876_352),
        (MOE, 30_532_122_624),
        (MIXTRAL, 46_702_792_704),
    ],
    ids=["llama-3-8b", "llama-3-70b", "qwen2.5-7b", "qwen2.5-32b", "qwen3-30b-a3b", "mixtral"],
)
def test_parameters(config, num_parameters):
    model = ModelConfig.parse(config, "m")
    assert model.num_parameters == num_parameters
    assert model.estimated_weight_bytes == 2 * num_parameters


def test_quantised_weights():
    config = config_json("Meta-Llama-3-8B-Instruct")
    linear = 32 * (4096 * 2 * (4096 + 1024) + 3 * 4096 * 14336)
    rest = 2 * (8_030_261_248 - linear)
    awq = {**config, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    fp8 = {**config, "quantization_config": {"quant_method": "fp8"}}
    assert (
        ModelConfig.parse(awq, "m").estimated_weight_bytes
        == linear // 2 + linear // 128 * 5 // 2 + rest
    )
    assert ModelConfig.parse(fp8, "m").estimated_weight_bytes == linear + rest
    text = {"text_config": {**config, "quantization_config": {"quant_method": "awq"}}}
    assert ModelConfig.parse(text, "m").weight_bits == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "weights quantised by hqq"),
        ({"n_routed_experts": 128, "first_k_dense_replace": 1}, "layers with experts and others"),
        ({"num_local_experts": 128, "interleave_moe_layer_step": 2}, "layers with experts"),
        ({"intermediate_size": None}, "no intermediate_size"),
    ],
)
def test_weights_of_unknown_size_are_not_guessed(changes, reason, tmp_path, capsys):
    config = {**config_json("Meta-Llama-3-8B-Instruct"), **changes}
    assert ModelConfig.parse(config, "m").unsized.startswith(reason)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"has {reason}" in refused(capsys, "--model", str(tmp_path), "--gpu-memory", "80GiB")
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 123}}')
    assert plan(capsys, str(tmp_path), "--gpu-memory", "80GiB")["weight_bytes"] == 123


def test_weights_of_the_shipped_model_are_read_from_its_file(capsys):
    facts = plan(capsys, "reference", "--gpu-memory", "1GiB", "--reserve", "1MB")
    assert facts["weight_bytes"] == 2 * 2_295_552
    assert facts["weight_source"] == "the weights' files"


def test_index_and_broken_weights(tmp_path):
    assert stored_weight_bytes(tmp_path) is None
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    with pytest.raises(ConfigError, match="cannot read the weights' headers"):
        stored_weight_bytes(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 123}}')
    assert stored_weight_bytes(tmp_path) == 123


def test_llama_in_80_gib(capsys, llama):
    facts = plan(capsys, llama, "--gpu-memory", "80GiB", "--context", "8K")
    weights = 2 * 8_030_261_248
    assert facts["kv_bytes_per_gpu"] == int(80 * GIB * 0.92) - 2 * GIB - weights
    formats = {each["name"]: each for each in facts["formats"]}
    assert formats["bf16"]["bytes_per_token"] == 32 * 8 * 128 * 2 * 2
    assert formats["fp8"]["bytes_per_token"] == 32 * 8 * 128 * 2
    assert formats["bf16"]["num_requests"] == facts["kv_bytes_per_gpu"] // (8192 * 131072) == 56
    ours = formats["k8v8-k4v2"]
    layout = PageLayout.derive(QuantConfig.parse("k8v8-k4v2"), 128)
    # Four closed rows, each with a window of its own, and the last tokens in an open one
    counts = [(64 + round((num - 64) * HIGH_SHARE), num) for num in (*[SEGMENT] * 3, SEGMENT - 16)]
    pages = 256 * sum(
        -(-high // layout.tiers[0].tokens_per_page)
        + -(-(num - high) // layout.tiers[1].tokens_per_page)
        for high, num in (*counts, (16, 16))
    )
    # For each head: a row of the directory, four counts, a last leaf of each tier with its entry of the
    # ring, a centre. For all of them: the chain, its length, thresholds, the prompt's
    leaf = suitable_leaf_entries(layout.max_pages(8192))
    row = -(-layout.max_pages(8192) // leaf) + 1 + 4
    table = 256 * (4 * (row + 2 * (leaf + 1)) + 2 * 128) + 4 * (2 * 6 + MORE_ROWS) + 16
    request = pages * (layout.page_bytes + 4 + -(-(leaf + 1) * 4 // leaf)) + 5 * table
    assert ours["bytes_per_token"] == request / 8192
    most = (facts["kv_bytes_per_gpu"] - FIXED_BYTES) // request
    assert 0.99 * most < ours["num_requests"] <= most
    assert facts["verdict"]["name"] == "k8v8-k4v2"
    assert facts["verdict"]["text"].startswith("yes: a bf16 decode step is KV-bound")
    bf16_read = weights / 56 + 8192 * 131072
    ours_read = weights / ours["num_requests"] + request
    assert facts["verdict"]["gain"] == pytest.approx(bf16_read / ours_read, rel=1e-6)


def test_what_is_planned_fits_the_pool():
    """As many requests as promised do fit the pool's pages, and one more does not fit the bytes."""
    model = ModelConfig.parse(config_json("Qwen2.5-7B-Instruct"), "m")
    rank = rank_of(model, model.estimated_weight_bytes, 1, 40 * GIB)
    quant, mix = QuantConfig.parse("k8v4-k4v2"), Mix(0.3, 0.1)
    planned = plan_format(quant, rank, 5000, mix)
    layout = PageLayout.derive(quant, model.head_dim)
    shape = PoolShape.fit(rank.kv_bytes, layout, 28, 4, 5000, planned.num_requests, SEGMENT)
    rows = [mix.tokens(quant, length) for length in (*[SEGMENT] * 2, 896, 8)]
    assert sum(map(sum, rows)) == 5000 - 2 * round(0.1 * (SEGMENT - 64)) - round(0.1 * 832)
    pages = (
        28
        * 4
        * sum(
            -(-num // tier.tokens_per_page)
            for counts in rows
            for num, tier in zip(counts, layout.tiers, strict=True)
        )
    )
    assert planned.num_requests * pages <= shape.num_pages
    assert planned.table_bytes == pytest.approx(shape.table_bytes, rel=0.002)
    assert (planned.num_requests + 1) * pages > shape.num_pages


def test_few_requests_are_bound_by_weights(capsys, llama):
    args = ("--gpu-memory", "80GiB", "--context", "8K", "--requests")
    few = plan(capsys, llama, *args, "4")["verdict"]
    assert (few["batch_bf16"], few["batch"]) == (4, 4)
    assert few["text"].startswith("a little: a bf16 decode step is weights-bound (21%")
    one = plan(capsys, llama, *args, "1")["verdict"]
    assert one["text"].startswith("no: ")
    assert one["gain"] < few["gain"] < 1.3


def test_only_compressed_fits(capsys, llama):
    facts = plan(capsys, llama, "--gpu-memory", "19.2GiB", "--context", "8K")
    formats = {each["name"]: each for each in facts["formats"]}
    assert formats["bf16"]["num_requests"] == 0
    assert not formats["bf16"]["starts"]
    assert formats["k8v8-k4v2"]["num_requests"] == facts["verdict"]["batch"] == 2
    assert facts["verdict"]["text"] == (
        "yes: bf16 holds no request of this context, k8v8-k4v2 holds 2"
    )


def test_tensor_parallelism(capsys, llama):
    one = plan(capsys, llama, "--gpu-memory", "80GiB")
    two = plan(capsys, llama, "--gpu-memory", "80GiB", "--tensor-parallel-size", "2")
    assert two["weight_bytes_per_gpu"] == one["weight_bytes"] // 2
    assert two["formats"][0]["bytes_per_token"] == one["formats"][0]["bytes_per_token"] / 2
    sixteen = plan(capsys, llama, "--gpu-memory", "80GiB", "--tensor-parallel-size", "16")
    assert sixteen["formats"][0]["bytes_per_token"] == one["formats"][0]["bytes_per_token"] / 8


def test_a_mixture_reads_the_experts_that_are_hit():
    model = ModelConfig.parse(MOE, "m")
    rank = rank_of(model, model.estimated_weight_bytes, 1, 100 * GIB)
    active = 30_532_122_624 - 48 * (128 - 8) * 3 * 2048 * 768
    assert rank.weight_bytes_read(1) == pytest.approx(2 * active, rel=1e-6)
    assert rank.weight_bytes_read(1000) == pytest.approx(rank.weight_bytes, rel=1e-6)


def test_table(capsys, llama):
    args = ["plan", "--model", str(llama), "--gpu-memory", "80GiB", "--quant", "k8v4", "k8v4-k4v2"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "KV budget of a GPU 56.64 GiB" in out
    for row in ("bf16", "fp8", "k8v4", "k8v4-k4v2"):
        assert f"│ {row} " in out
    assert "Assumed for pairs: 10% of the tokens outside the window" in out
    assert "Will compression pay? yes: " in out


def test_refusals(capsys, llama, tmp_path):
    model = ("--model", str(llama))
    assert "leaves no KV cache" in refused(capsys, *model, "--gpu-memory", "16GiB")
    for memory in ("24", "2GiB"):
        line = refused(capsys, *model, "--gpu-memory", memory)
        assert "is used up by the 2.00 GiB of --reserve" in line
    assert "must divide 32 query heads" in refused(
        capsys, *model, "--gpu-memory", "80GiB", "--tensor-parallel-size", "3"
    )
    assert "--gpu-memory must be bytes or a number with a unit" in refused(
        capsys, *model, "--gpu-memory", "much"
    )
    assert "--high-share must be in 0 .. 1" in refused(
        capsys, *model, "--gpu-memory", "80GiB", "--high-share", "2"
    )
    memory = ("--gpu-memory", "80GiB")
    assert "neither a folder nor a model id" in refused(capsys, "--model", "nope", *memory)
    assert "does not exist" in refused(capsys, "--model", "/no/where", *memory)
    assert "has no config.json" in refused(capsys, "--model", str(tmp_path), *memory)
    (tmp_path / "config.json").write_text('{"kv_lora_rank": 512}')
    assert "has MLA" in refused(capsys, "--model", str(tmp_path), *memory)
    (tmp_path / "config.json").write_text('{"hidden_size": 512}')
    assert "has no 'num_attention_heads'" in refused(capsys, "--model", str(tmp_path), *memory)


def test_a_model_id_without_the_hubs_library(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(capsys, "--model", "owner/name", "--gpu-memory", "80GiB")
    assert line.endswith("give a folder, or pip install huggingface_hub")


GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 6912,
    "vocab_size": 262144,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
}


def test_layers_with_a_window_are_planned_as_vllm_keeps_them(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    flags = ("--gpu-memory", "8GiB", "--context", "8K", "--quant", "k8v4")
    facts = plan(capsys, tmp_path, *flags)
    assert (facts["num_windows"], facts["window"]) == (22, 512)
    bf16, _, ours = facts["formats"]
    per_layer = 2 * 256 * 2
    window = 22 * per_layer * (512 + 16)
    assert bf16["bytes_per_token"] == (4 * per_layer * 8192 + window) / 8192
    assert ours["window_bytes"] == ours["num_requests"] * window
    assert ours["num_requests"] * ours["bytes_per_token"] * 8192 <= facts["kv_bytes_per_gpu"]
    assert main(["plan", "--model", str(tmp_path), *flags]) == 0
    assert (
        "22 layers with a window or chunk of 512 tokens keep vLLM's own cache"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("said", "num_chunks"),
    [
        ({"layer_types": ["chunked_attention", "full_attention"] * 13}, 13),
        ({"no_rope_layers": [1, 1, 1, 1, 0] * 5 + [1]}, 21),
        ({"no_rope_layers": [], "no_rope_layer_interval": 2}, 13),
        ({}, 20),
    ],
)
def test_chunks_are_planned_as_windows_are(said, num_chunks):
    model = ModelConfig.parse(
        {**GEMMA, "sliding_window": None, "attention_chunk_size": 512, **said}, "m"
    )
    assert (model.num_windows, model.window, model.num_full) == (num_chunks, 512, 26 - num_chunks)
    rank = rank_of(model, 1, 1, GIB)
    assert rank.window_bytes(8192, 16) == num_chunks * 2 * 256 * 2 * (512 + 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window_pattern": None}, "no layer with full attention"),
        (
            {"layer_types": ["linear_attention", "full_attention"] * 13},
            "layers of linear_attention",
        ),
    ],
)
def test_layers_that_are_not_served_are_not_planned(changes, message):
    model = ModelConfig.parse({**GEMMA, **changes}, "m")
    with pytest.raises(ConfigError, match=message):
        rank_of(model, 1, 1, GIB)
