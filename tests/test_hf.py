"""The transformers cache: exact without loss, padded or not, and honest about bytes."""

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from diffkv import hf  # noqa: E402
from diffkv.hf import DiffKVHFCache, PoolOptions  # noqa: E402
from diffkv.lab.evaluation import baselines  # noqa: E402
from diffkv.policy import Thresholds  # noqa: E402
from diffkv.pool import check_invariants  # noqa: E402
from diffkv.quant import ConfigError  # noqa: E402

DATA = Path(__file__).parents[1] / "src" / "diffkv" / "data"
ROWS = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()][:3]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model():
    folder = DATA / "reference"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs():
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "reference", padding_side="left")
    tokenizer.pad_token = "<pad>"
    return tokenizer([row["prompt"] for row in ROWS], return_tensors="pt", padding=True)


def generate(model, inputs, cache=None):
    return model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.fixture
def attached(model):
    yield hf.attach(model)
    hf.detach(model)


@pytest.fixture(scope="module")
def plain(model, inputs):
    return generate(model, inputs)


def test_without_loss_the_logits_are_those_of_the_plain_cache(plain, attached, inputs):
    assert len(set(inputs.attention_mask.sum(1).tolist())) > 1, "padding is part of the test"
    cache = DiffKVHFCache(attached, "k16v16")
    ours = generate(attached, inputs, cache)

    assert torch.equal(ours.sequences, plain.sequences)
    for step, (got, expected) in enumerate(zip(ours.logits, plain.logits, strict=True)):
        assert torch.allclose(got, expected, atol=2e-4, rtol=1e-4), step
    check_invariants(cache.state)
    assert cache.use().dropped == 0


def test_feeding_tokens_is_generating_them(plain, attached, inputs):
    cache = DiffKVHFCache(attached, "k16v16")
    first = plain.sequences[:, inputs.input_ids.shape[1] :]
    with torch.no_grad():
        attached(**inputs, past_key_values=cache, position_ids=positions(inputs))
    logits = hf.feed(attached, cache, first[:, :-1])
    assert torch.equal(logits.argmax(-1), first[:, 1:])


def positions(inputs):
    return (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)


def test_bytes_are_those_of_the_pool(attached, inputs):
    cache = DiffKVHFCache(attached, "k8v4-k4v2", thresholds=Thresholds(3.0, 0.5), max_tokens=1200)
    generate(attached, inputs, cache)
    state, use = cache.state, cache.use()
    head, tail = state.ring_ends.tolist()
    num_tokens = int(inputs.attention_mask.sum()) + len(ROWS) * (NEW_TOKENS - 1)

    assert use.tokens == num_tokens
    assert use.pages == state.num_pages - (tail - head)
    assert use.num_bytes > use.pages * state.layout.page_bytes
    assert use.dropped > 0 and use.low > use.high
    assert use.high + use.low + use.dropped == pytest.approx(num_tokens)
    assert sum(cache.use(row).num_bytes for row in range(len(ROWS))) == use.num_bytes
    assert use.bf16_bytes == num_tokens * 3 * 2 * 64 * 2 * 2
    assert 3 < use.ratio_bf16 < use.nominal_ratio_bf16


def test_budget_of_a_baseline_shows_in_the_pool(attached, inputs):
    cache = DiffKVHFCache(attached, "k8v4", policy=baselines.parse("topk:keep=0.5"))
    with torch.no_grad():
        attached(**inputs, past_key_values=cache, position_ids=positions(inputs))
    state = cache.state
    kept = state.num_tokens[[rows.slot for rows in cache._rows], :, :, 0]
    for row, length in enumerate(inputs.attention_mask.sum(1).tolist()):
        assert (kept[row] == round(length / 2)).all()


def test_all_queries_score_otherwise_and_keep_the_means_in_proportion(attached, inputs):
    used = []
    for policy in ("paper", "paper:queries=all"):
        cache = DiffKVHFCache(attached, "k8v4-k4v2", policy, Thresholds(3.0, 0.5))
        generate(attached, inputs, cache)
        check_invariants(cache.state)
        used.append(cache.use().high)
    assert used[0] != used[1]


@pytest.mark.parametrize("segment", [0, 32])
def test_turns_on_one_cache(model, inputs, segment):
    """Prompts after answers, and a copy between them, as with the full cache."""
    ids = inputs.input_ids[:, -100:]
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    hf.detach(model)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=at).logits
        hf.attach(model)
        cache, got = DiffKVHFCache(model, "k16v16", pool=PoolOptions(segment=segment)), []
        for start, end in pairwise((0, 50, 51, 52, 80, 81, ids.shape[1])):
            if start == 80:
                cache = copy.deepcopy(cache)
            span = slice(start, end)
            logits = model(
                ids[:, span],
                attention_mask=mask[:, :end],
                position_ids=at[:, span],
                past_key_values=cache,
            ).logits
            got.append(logits)
    check_invariants(cache.state)
    is_token = mask.bool()
    torch.testing.assert_close(
        torch.cat(got, 1)[is_token], expected[is_token], atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("stored", [0, 40])
def test_a_refused_pass_changes_nothing(attached, inputs, stored):
    """Not what the cache holds, nor the logits of the pass that follows."""
    ids, size = inputs.input_ids[:1, -80:], 40 if stored else 80
    span = slice(stored, stored + size)
    got = []
    for refusals in (False, True):
        cache = DiffKVHFCache(attached, "k16v16", max_tokens=100)
        with torch.no_grad():
            if stored:
                attached(ids[:, :stored], past_key_values=cache)
        if refusals:
            with pytest.raises(ValueError, match="no gradients"):
                attached(ids[:, span], past_key_values=cache)
            with torch.no_grad(), pytest.raises(ValueError, match="raise max_tokens"):
                attached(ids.repeat(1, 2), past_key_values=cache)
            assert cache.get_seq_length() == stored
        with torch.no_grad():
            got.append(attached(ids[:, span], past_key_values=cache).logits)
        assert cache.use().tokens == stored + size
        check_invariants(cache.state)
    assert torch.equal(*got)


def test_what_has_stored_some_layers_only_is_not_gone_on_with(attached, inputs, monkeypatch):
    ids, cache = inputs.input_ids[:1, -80:], DiffKVHFCache(attached)
    inside = attached.model.layers[1].self_attn.q_proj
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(inside, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attached(ids, past_key_values=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"reset\(\)"):
            attached(ids, past_key_values=cache)
        cache.reset()
        expected = attached(ids, past_key_values=DiffKVHFCache(attached)).logits
        assert torch.equal(attached(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize(("max_tokens", "turns"), [(64, [3] * 20), (4096, [40] * 30 + [300] * 9)])
def test_many_turns_have_room_or_are_refused(attached, inputs, max_tokens, turns):
    """Each closes a row, which has half-empty pages of its own."""
    torch.manual_seed(0)
    cache = DiffKVHFCache(attached, max_tokens=max_tokens, pool=PoolOptions(segment=1024))
    num = 0
    with torch.no_grad():
        for turn in turns:
            ids = torch.randint(3, 100, (1, turn))
            try:
                attached(ids, past_key_values=cache)
            except ValueError as error:
                assert "more rows" in str(error)
                break
            num += turn
    assert cache.use().tokens == num
    assert num == sum(turns) or num > 1024
    check_invariants(cache.state)
    kept = cache.state.num_tokens[cache._rows[0].rows].sum((0, 3))
    assert (kept == num).all()


def test_layers_that_scale_their_scores_otherwise_are_refused(attached, inputs, monkeypatch):
    attached.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx"):
        DiffKVHFCache(attached)
    del attached.config.scale_attn_by_inverse_layer_idx
    monkeypatch.setattr(attached.model.layers[1].self_attn, "scaling", 0.1)
    with torch.no_grad(), pytest.raises(ValueError, match=r"scales its scores by 0\.1"):
        attached(inputs.input_ids, past_key_values=DiffKVHFCache(attached))


def test_masks_that_are_not_causal_are_refused(attached, inputs):
    from transformers.masking_utils import create_causal_mask

    given = {"config": attached.config, "past_key_values": None, "attention_mask": None}
    given["inputs_embeds"] = torch.zeros(1, 8, attached.config.hidden_size)
    assert create_causal_mask(**given) is None
    with pytest.raises(ValueError, match="not plainly causal"):
        create_causal_mask(**given, or_mask_function=lambda batch, head, query, key: key < 4)


def test_one_pass_without_a_cache_changes_nothing(attached, inputs):
    cache = DiffKVHFCache(attached)
    with torch.no_grad():
        with pytest.raises(ValueError, match="use_cache=False"):
            attached(inputs.input_ids, past_key_values=cache, use_cache=False)
        assert cache.is_empty
        attached(inputs.input_ids, past_key_values=cache)


def test_a_negative_segment_is_refused(attached):
    with pytest.raises(ConfigError, match="segment"):
        DiffKVHFCache(attached, pool=PoolOptions(segment=-16))


def test_refusals(model, attached, inputs):
    ids = inputs.input_ids
    with torch.no_grad():
        cache = DiffKVHFCache(attached)
        with pytest.raises(ValueError, match="pad prompts on the left"):
            attached(ids, attention_mask=inputs.attention_mask.flip(1), past_key_values=cache)
        cache = DiffKVHFCache(attached, max_tokens=64)
        with pytest.raises(ValueError, match="raise max_tokens"):
            attached(ids, past_key_values=cache)
        cache = DiffKVHFCache(attached)
        attached(ids[:, -80:], past_key_values=cache)
        with pytest.raises(NotImplementedError):
            cache.reorder_cache(torch.tensor([0]))
        with pytest.raises(ValueError, match="DiffKVHFCache"):
            attached(ids[:, -8:])
    with pytest.raises(ConfigError, match="low tier"):
        DiffKVHFCache(attached, "k8v4", policy=baselines.parse("topk:survivors=low"))
    for window in (0, 2**64):
        with pytest.raises(
            ConfigError, match=f"window must be 1 to 2147483647 tokens, got {window}"
        ):
            DiffKVHFCache(attached, window=window)
    hf.detach(model)
    with pytest.raises(ConfigError, match="attach"):
        DiffKVHFCache(model)
