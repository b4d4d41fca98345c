"""With all tokens high, logits are as close to full precision as the quantiser's steps allow.

Bound. An element x of a group with step s and zero z is stored as x' with

    |x - x'| <= s/2 + 2^-11 (|z| + 2^b s),

half a step, plus the rounding of zero and step to float16. Let m be the difference of the two largest
logits, a function of all keys and values that a decode step reads. To first order

    |m - m'| <= sum over elements of |dm/dx| |x - x'|,

with the derivatives of the full-precision model. The test allows a fifth more for higher orders.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODEL, engine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache

from diffkv.cli.prompts import read_questions
from diffkv.quant import Format
from diffkv.reference import quantize

HIGHER_ORDERS = 1.2
PROMPTS = Path(MODEL).parent / "prompts.jsonl"


class LeafCache(DynamicCache):
    """Keys and values that a step reads, with a zero added to each that derivatives can be taken of."""

    def __init__(self, past: Cache) -> None:
        super().__init__()
        self._past = [(layer.keys.detach(), layer.values.detach()) for layer in past.layers]
        self.read: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.zeros: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for i, (k, v) in enumerate(self._past):
            self.update_past(k, v, i)

    def update_past(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> None:
        super().update(k, v, layer)

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kw: Any
    ) -> Any:
        k, v = super().update(key_states, value_states, layer_idx, *args, **kw)
        zeros = tuple(torch.zeros_like(x, requires_grad=True) for x in (k, v))
        self.zeros[layer_idx] = zeros
        self.read[layer_idx] = (k.detach(), v.detach())
        return k + zeros[0], v + zeros[1]


def element_bound(x: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """The bound above for every element of vectors x [..., head_dim]."""
    flat = x.reshape(-1, x.shape[-1])
    _, meta = quantize(flat, bits, groups)
    scale, zero = meta.float().unbind(-1)
    bound = scale / 2 + 2.0**-11 * (zero.abs() + 2**bits * scale)
    return bound.repeat_interleave(x.shape[-1] // groups, -1).view(x.shape)


def full_precision_margin(
    model: Any, ids: list[int], fmt: Format
) -> tuple[float, float, tuple[int, int]]:
    """(m, bound on its change, the two tokens) of the step that reads `ids[:-1]` from the cache."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        past = model(tokens[:, :-1], use_cache=True).past_key_values
    cache = LeafCache(past)
    logits = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    margin = logits[first] - logits[second]
    bound = 0.0
    for layer, zeros in cache.zeros.items():
        gradients = torch.autograd.grad(margin, zeros, retain_graph=True)
        formats = ((fmt.k_bits, fmt.k_groups), (fmt.v_bits, fmt.v_groups))
        for x, gradient, (bits, groups) in zip(cache.read[layer], gradients, formats, strict=True):
            bound += float((gradient.abs() * element_bound(x, bits, groups)).sum())
    return float(margin.detach()), bound, (first, second)


@pytest.mark.parametrize("quant", ["k8v8", "k8v4", "k8v4g1x2"])
def test_logits_within_bound(quant: str) -> None:
    from vllm import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    questions = read_questions(PROMPTS)
    prompts = [tokenizer(q.prompt).input_ids for q in questions]
    with engine(quant, {"rotate": "none"}, max_logprobs=512) as llm:
        params = SamplingParams(temperature=0, max_tokens=2, logprobs=512)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    shares = []
    for prompt, output in zip(prompts, outputs, strict=True):
        # The first token comes from the prefill, which is exact; the second one reads the cache.
        token, logprobs = output.outputs[0].token_ids[0], output.outputs[0].logprobs[1]
        margin, bound, (first, second) = full_precision_margin(
            model, [*prompt, token], Format.parse(quant)
        )
        ours = logprobs[first].logprob - logprobs[second].logprob
        shares.append(abs(ours - margin) / bound)
    assert max(shares) <= HIGHER_ORDERS, shares
    assert max(shares) > 1e-3, "the cache was not compressed"
