"""A transformers cache with real pages: `generate` over compressed keys and values.

    model = AutoModelForCausalLM.from_pretrained(...)
    diffkv.hf.attach(model)
    cache = DiffKVHFCache(model, quant="k8v8-k4v2")
    model.generate(**inputs, past_key_values=cache)
    print(cache.use())

The first forward pass is the prompt: exact attention, then its tokens are sorted into tiers and
stored, segment by segment. A later one of one token adds it to each sequence and attends to pages; one
of several tokens is the prompt of another turn. No dense copy is kept.
Batches may be padded on the left: padding is neither stored nor attended to.
"""

from diffkv.hf.attention import IMPLEMENTATION, attach, detach
from diffkv.hf.cache import DiffKVHFCache, PoolOptions, feed
from diffkv.use import CacheUse

__all__ = ["IMPLEMENTATION", "CacheUse", "DiffKVHFCache", "PoolOptions", "attach", "detach", "feed"]
