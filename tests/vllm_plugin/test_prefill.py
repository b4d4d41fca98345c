"""vLLM's kernel as the attention of prompts: what torch's gives, for whole prompts and for chunks."""

import pytest
import torch
from vllm.v1.attention.backends import cpu_attn

from diffkv.prefill import Spans, torch_prefill
from diffkv.uploads import at_once
from diffkv.vllm_plugin.worker.prefill import choose_prefill

WORST = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", WORST)
def test_cpu_prefill_is_causal_attention(head_dim, dtype):
    torch.manual_seed(0)
    prefill = choose_prefill("cpu", dtype, head_dim)
    assert prefill is not torch_prefill
    shapes = [(1, 1), (129, 129), (3, 200), (128, 300)]
    spans = Spans.of(*zip(*shapes, strict=True), at_once(torch.device("cpu")))
    query = torch.randn(sum(spans.num_queries), 8, head_dim).to(dtype)
    key, value = (torch.randn(sum(spans.num_keys), 2, head_dim).to(dtype) for _ in "kv")
    got, want = torch.full_like(query, torch.nan), torch.full(query.shape, torch.nan)
    prefill(query, key, value, spans, head_dim**-0.5, got)
    torch_prefill(query.float(), key.float(), value.float(), spans, head_dim**-0.5, want)
    assert (got.float() - want).abs().max() < WORST[dtype]


def test_a_head_dim_that_vllm_does_not_have():
    assert choose_prefill("cpu", torch.bfloat16, 72) is torch_prefill


@pytest.mark.parametrize("is_allowed", [True, False])
def test_amx_is_asked_for_before_it_is_used(monkeypatch, is_allowed):
    asked = []
    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *_: "amx")
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(1) or is_allowed)
    prefill = choose_prefill("cpu", torch.bfloat16, 64)
    assert asked == [1] and (prefill is torch_prefill) != is_allowed
