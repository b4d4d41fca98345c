"""vLLM's kernel as the attention of prompts: what torch's gives, for whole prompts and for chunks."""

import pytest
import torch

from diffkv.prefill import torch_prefill
from diffkv.vllm_plugin.prefill import choose_prefill

WORST = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", WORST)
def test_cpu_prefill_is_causal_attention(head_dim, dtype):
    torch.manual_seed(0)
    prefill = choose_prefill("cpu", dtype, head_dim)
    assert prefill is not torch_prefill
    shapes = [(1, 1), (129, 129), (3, 200), (128, 300)]
    queries = [torch.randn(n, 8, head_dim).to(dtype) for n, _ in shapes]
    keys, values = ([torch.randn(n, 2, head_dim).to(dtype) for _, n in shapes] for _ in "kv")
    got, want = ([torch.full(q.shape, torch.nan) for q in queries] for _ in "ab")
    outputs = [x.to(dtype) for x in got]
    prefill(queries, keys, values, head_dim**-0.5, outputs)
    exact = [[x.float() for x in xs] for xs in (queries, keys, values)]
    torch_prefill(*exact, head_dim**-0.5, want)
    for output, expected in zip(outputs, want, strict=True):
        assert (output.float() - expected).abs().max() < WORST[dtype]


def test_a_head_dim_that_vllm_does_not_have():
    assert choose_prefill("cpu", torch.bfloat16, 72) is torch_prefill
