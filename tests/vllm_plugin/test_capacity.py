"""vLLM's own figures of the capacity keep their meaning."""

import stepping
from conftest import engine, metric, random_prompts


def test_blocks_times_tokens_of_a_block_are_the_capacity():
    with engine("k8v4-k4v2", {}, max_model_len=2048, kv_cache_memory_bytes=16 << 20) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        product = cache.num_gpu_blocks * cache.block_size
        assert cache.kv_cache_size_tokens - cache.block_size < product <= cache.kv_cache_size_tokens
        # The whole of it can be used: requests of that many tokens, all high, run together
        scheduler = stepping.scheduler(llm)
        assert scheduler.kv_cache_manager.usage == 0
        prompts = random_prompts(8, 600, seed=1)
        requests = {
            f"r{i}": stepping.Request(prompt, 4, {"diffkv": "off"})
            for i, prompt in enumerate(prompts)
        }
        assert sum(map(len, prompts)) < product
        driven = stepping.drive(llm, requests, lambda step: None)
        assert all(len(tokens) == 4 for tokens in driven.token_ids.values())
        assert metric(llm, "vllm:num_preemptions") == 0
