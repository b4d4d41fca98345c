"""Copies of the transformers cache have pages of their own; refusals say their real reason."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from diffkv import hf  # noqa: E402
from diffkv.hf import DiffKVHFCache  # noqa: E402
from diffkv.policy import Thresholds  # noqa: E402
from diffkv.pool import check_invariants, contents  # noqa: E402

DATA = Path(__file__).parents[1] / "src" / "diffkv" / "data"
PROMPTS = [
    json.loads(line)["prompt"] for line in (DATA / "prompts.jsonl").read_text().splitlines()
][1:3]
MAX_TOKENS = 1300


@pytest.fixture(scope="module")
def model():
    folder = DATA / "reference"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return hf.attach(model)


@pytest.fixture(scope="module")
def inputs():
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "reference", padding_side="left")
    tokenizer.pad_token = "<pad>"
    return tokenizer(PROMPTS, return_tensors="pt", padding=True)


def prefilled(model, inputs, quant="k8v4-k4v2") -> DiffKVHFCache:
    thresholds = Thresholds(3.0, 0.5) if quant == "k8v4-k4v2" else None
    cache = DiffKVHFCache(model, quant, thresholds=thresholds, max_tokens=MAX_TOKENS)
    positions = (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, position_ids=positions)
    return cache


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def held(cache):
    return contents(cache.state)


def same(a, b, names=None) -> bool:
    return all(torch.equal(a[name], b[name]) for name in names or a)


COPIES = (copy.deepcopy, copy.copy, pickled, saved)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("quant", ["k16v16", "k8v4-k4v2"])
def test_a_copy_goes_on_as_the_original_would_and_leaves_it_alone(model, inputs, copied, quant):
    cache = prefilled(model, inputs, quant)
    other, before = copied(cache), held(cache)
    tokens = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(0))

    theirs = hf.feed(model, other, tokens)
    assert other.get_seq_length() == cache.get_seq_length() + 40
    assert same(held(cache), before), "feeding the copy has changed the original"
    check_invariants(other.state)

    assert torch.equal(hf.feed(model, cache, tokens), theirs)
    # Pages that both have taken since differ where nothing is written yet
    assert same(held(cache), held(other), ("page_ids", "num_tokens", "directory", "free_ring"))
    assert cache.use() == other.use()


def test_questions_over_one_prefix_get_the_answers_of_the_plain_cache(model, inputs):
    cache = prefilled(model, inputs, "k16v16")
    questions = torch.randint(10, 200, (3, 2, 5), generator=torch.Generator().manual_seed(1))
    plain = transformers.DynamicCache()
    positions = (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)
    hf.detach(model)
    with torch.no_grad():
        model(**inputs, past_key_values=plain, position_ids=positions)
        expected = []
        for tokens in questions:
            mask = torch.cat([inputs.attention_mask, torch.ones_like(tokens)], 1)
            at = (mask.cumsum(1) - 1)[:, -5:]
            expected.append(
                model(
                    tokens,
                    past_key_values=copy.deepcopy(plain),
                    attention_mask=mask,
                    position_ids=at,
                ).logits
            )
    hf.attach(model)
    for tokens, logits in zip(questions, expected, strict=True):
        got = hf.feed(model, copy.deepcopy(cache), tokens)
        assert torch.allclose(got, logits, atol=2e-4, rtol=1e-4)


def test_an_empty_cache_is_copied_too(model, inputs):
    other = copy.deepcopy(DiffKVHFCache(model, "k8v4", max_tokens=MAX_TOKENS))
    assert other.is_empty
    with torch.no_grad():
        model(inputs.input_ids[:, -64:], past_key_values=other)
    assert other.get_seq_length() == 64


def test_a_copy_of_little_does_not_carry_the_whole_pool(model, inputs):
    cache = prefilled(model, inputs)
    pool_bytes = cache.state.pages.numel()
    assert len(pickle.dumps(cache)) < pool_bytes / 2


def test_a_mask_of_queries_is_refused_as_such(model, inputs):
    ids = inputs.input_ids[:1, -8:]
    mask = torch.ones(1, 1, 8, 8).tril().bool()
    with pytest.raises(ValueError, match=r"mask for each query.*\[1, 1, 8, 8\]"), torch.no_grad():
        model(ids, past_key_values=DiffKVHFCache(model, max_tokens=64), attention_mask=mask)


def test_a_mask_that_hides_what_is_stored_is_refused(model, inputs):
    ids, cache = inputs.input_ids[:1, -8:], DiffKVHFCache(model, max_tokens=64)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        mask = torch.ones(1, 9, dtype=torch.long)
        model(ids[:, :1], past_key_values=cache, attention_mask=mask)
        mask = torch.tensor([[0, 0, *[1] * 8]])
        with pytest.raises(ValueError, match="differs from the prompt's"):
            model(ids[:, :1], past_key_values=cache, attention_mask=mask)


def test_guidance_is_refused_as_such(model, inputs):
    ids = inputs.input_ids[:1, -8:]
    cache = DiffKVHFCache(model, max_tokens=64)
    with pytest.raises(ValueError, match="guidance_scale is not supported"):
        model.generate(
            ids, past_key_values=cache, guidance_scale=2.0, max_new_tokens=2, do_sample=False
        )


@pytest.mark.parametrize("own_cache", [True, False])
def test_use_cache_false_is_refused_as_such(model, inputs, own_cache):
    ids = inputs.input_ids[:1, -8:]
    given = {"past_key_values": DiffKVHFCache(model, max_tokens=64)} if own_cache else {}
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, use_cache=False, max_new_tokens=3, do_sample=False, **given)
