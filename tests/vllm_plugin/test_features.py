"""What vLLM builds on top of generation, over a lossless cache, against vLLM's own cache."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import HIDDEN, VOCABULARY, make
from conftest import engine, random_prompts
from safetensors.torch import save_file
from stepping import check_empty
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FAMILY, HEAD_DIM, QUERY_HEADS = "llama3", 128, 4
RANK = 8
NEW_TOKENS = 16
PROMPTS = [{"prompt_token_ids": prompt} for prompt in random_prompts(4, 150)]


def write_byte_tokenizer(folder: Path) -> None:
    """A token for every byte: words alone could spell no JSON."""
    names = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused{i}>" for i in range(len(names), VOCABULARY)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_adapter(folder: Path) -> Path:
    """A LoRA adapter of the checkpoint's query projections, large enough to change what is said."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) / 4
        tensors[f"{name}.lora_B.weight"] = torch.randn(
            QUERY_HEADS * HEAD_DIM, RANK, generator=generator
        )
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Outputs:
    """What one engine made of the same requests in several ways."""

    plain: list[list[int]]
    adapted: list[list[int]]
    beams: list[list[tuple[list[int], float]]]
    structured: dict[str, str]


STRUCTURED = {
    "choice": {"choice": ["north", "south", "south-west"]},
    "regex": {"regex": r"[a-c]{3}-[0-9]{4}"},
    "json": {
        "json": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        }
    },
}


def outputs(llm: Any, adapter: Path) -> Outputs:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

    def token_ids(**arguments: Any) -> list[list[int]]:
        done = llm.generate(PROMPTS, greedy, use_tqdm=False, **arguments)
        return [list(output.outputs[0].token_ids) for output in done]

    beams = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=3, max_tokens=NEW_TOKENS))
    structured = {}
    for name, constraint in STRUCTURED.items():
        params = SamplingParams(
            temperature=0,
            max_tokens=4 * NEW_TOKENS,
            structured_outputs=StructuredOutputsParams(**constraint),
        )
        (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
        structured[name] = output.outputs[0].text
    return Outputs(
        token_ids(),
        token_ids(lora_request=LoRARequest("adapter", 1, str(adapter))),
        [[(list(s.tokens), s.cum_logprob) for s in beam.sequences] for beam in beams],
        structured,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Outputs, Outputs]]:
    """Of vLLM's own cache, and of ours."""
    folder = tmp_path_factory.mktemp("features")
    model, adapter = make(FAMILY, folder / "model"), make_adapter(folder / "adapter")
    write_byte_tokenizer(model)
    arguments = {
        "model": str(model),
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enable_lora": True,
        "max_lora_rank": RANK,
        "kv_cache_memory_bytes": 32 << 20,
        "max_logprobs": 8,
    }
    with engine(**arguments) as llm:
        stock = outputs(llm, adapter)
    with engine("k16v16", **arguments) as llm:
        ours = outputs(llm, adapter)
        llm.llm_engine.step()
        check_empty(llm)
    yield stock, ours


def test_lora(both: tuple[Outputs, Outputs]) -> None:
    stock, ours = both
    assert ours.adapted == stock.adapted != stock.plain
    assert ours.plain == stock.plain


def test_beam_search(both: tuple[Outputs, Outputs]) -> None:
    """Every beam of every step is a request of its own, with its prompt computed anew."""
    stock, ours = both
    for mine, theirs in zip(ours.beams, stock.beams, strict=True):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in theirs]
        assert [p for _, p in mine] == pytest.approx([p for _, p in theirs], abs=1e-3)
    assert any(beams[0][0] != beams[1][0] for beams in ours.beams)


def test_structured_output(both: tuple[Outputs, Outputs]) -> None:
    stock, ours = both
    assert ours.structured == stock.structured
    assert ours.structured["choice"] in STRUCTURED["choice"]["choice"]
    assert re.fullmatch(STRUCTURED["regex"]["regex"], ours.structured["regex"])
    assert json.loads(ours.structured["json"])["a"] in (False, True)
