"""How the KV memory is divided, and that the least pool holds the longest request of any tiers."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CacheConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

from diffkv.policy import Thresholds
from diffkv.quant import ConfigError
from diffkv.segments import RowEnds
from diffkv.vllm_plugin import division
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.scheduler.running import Bounds, Running
from diffkv.vllm_plugin.spec import DividedSpec

HEADS, HEAD_DIM, BLOCK = 2, 64, 16
WINDOW = 128


def spec(quant: str, longest: int, segment: int, num_layers: int = 4) -> DividedSpec:
    base = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32
    )
    layout = Options(quant=quant).layout(HEAD_DIM, 4)
    return DividedSpec.of(base, layout, num_layers, longest, 64, segment)


@pytest.mark.parametrize("segment", [0, 128, 1024])
@pytest.mark.parametrize("longest", [100, 1000, 5000])
@pytest.mark.parametrize("quant", ["k16v16", "k8v4", "k8v4-k4v2"])
def test_the_least_pool_holds_the_longest_request(quant: str, longest: int, segment: int) -> None:
    """By the worst of what every step may need, for prompts and chunks of any length."""
    ours = spec(quant, longest, segment)
    shape = ours.pool_shape(ours.least_pool_bytes(longest))
    num_usable, bounds = shape.num_pages // shape.num_layers, Bounds(shape)
    rng = np.random.default_rng(longest + segment)
    for _ in range(8):
        prompt_len = int(rng.integers(1, longest + 1))
        most = int(rng.choice([1, 37, 300, longest]))
        ends = RowEnds(segment, prompt_len, int(rng.integers(0, prompt_len + 1)) if segment else 0)
        running = Running(None, Thresholds(), ends, 1, 0, [], 0, 0)
        closed = num_rows = 0
        while running.num_tokens < longest:
            left = prompt_len - running.num_tokens
            step = int(rng.integers(1, most + 1))
            step = min(step, left if left > 0 else longest - running.num_tokens)
            need = bounds.step(running, running.num_tokens + step)
            closed, num_rows = closed + sum(need.row_blocks), num_rows + len(need.rows)
            assert closed + need.open_blocks <= num_usable
            assert 1 + num_rows <= shape.num_slots
            running.num_tokens += step
            running.start = need.rows[-1][1] if need.rows else running.start


@dataclass
class World:
    """vLLM's configuration, as far as the division reads it."""

    layout: str = "LBHNC"
    longest: int = 4096
    max_num_seqs: int = 64
    states: str = "none"
    groups: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        cache = CacheConfig(block_size=BLOCK)
        cache.kv_cache_layout = self.layout
        self.config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=self.longest, hf_config=None),
            scheduler_config=SimpleNamespace(
                max_num_seqs=self.max_num_seqs, disable_hybrid_kv_cache_manager=False
            ),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            attention_config=SimpleNamespace(hisparse_config=None),
            speculative_config=None,
            cache_config=cache,
            max_in_flight_tokens=512,
        )

    def made(self, ours: DividedSpec, kinds: str, num_bytes: int) -> Any:
        """vLLM's plan for layers of full attention (f), windows (w) and states (s)."""
        window = SlidingWindowSpec(
            block_size=BLOCK,
            num_kv_heads=HEADS,
            head_size=HEAD_DIM,
            dtype=torch.float32,
            sliding_window=WINDOW,
        )
        state = MambaSpec(
            block_size=self.longest,
            shapes=((7, 11), (5, 13)),
            dtypes=(torch.float32, torch.float32),
            page_size_padded=window.page_size_bytes,
            mamba_cache_mode=self.states,
        )
        of_kind = {"f": ours, "w": window, "s": state}
        specs = {f"{i}": of_kind[kind] for i, kind in enumerate(kinds)}
        self.groups = get_kv_cache_groups(self.config, specs)
        return get_kv_cache_config_from_groups(self.config, self.groups, num_bytes)


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("kinds", ["wwf" * 4, "wf" * 4, "wwwwwf" * 4 + "ww", "sssf" * 4])
@pytest.mark.parametrize("megabytes", [48, 1024])
def test_both_parts_hold_what_was_promised(kinds: str, megabytes: int, layout: str) -> None:
    world = World(layout)
    ours = spec("k8v4-k4v2", world.longest, 1024, kinds.count("f"))
    plan = world.made(ours, kinds, megabytes << 20)
    size, total = plan.kv_cache_tensors[0].size, plan.num_blocks
    made = division.divide(plan, world.config)
    assert made is not None
    assert made.pool_bytes + made.blocks_bytes == size
    assert plan.num_blocks == made.num_blocks < total
    assert {tensor.size for tensor in plan.kv_cache_tensors} == {made.blocks_bytes}
    # as vLLM itself would have planned it in so many bytes
    theirs = get_kv_cache_config_from_groups(world.config, world.groups, made.blocks_bytes)
    assert (plan.num_blocks, plan.kv_cache_tensors) == (theirs.num_blocks, theirs.kv_cache_tensors)
    assert made.pool_bytes >= ours.least_pool_bytes(world.longest)
    windows = [
        group for group in world.groups if isinstance(group.kv_cache_spec, SlidingWindowSpec)
    ]
    longest = -(-(WINDOW - 1 + 512) // BLOCK) + 1
    assert made.num_blocks > len(windows) * longest
    assert made.num_layers == kinds.count("f")
    assert made.num_layers + made.num_others == len(kinds)
    assert made.max_concurrency >= 1


def test_blocks_are_no_more_than_requests_can_use() -> None:
    world = World(max_num_seqs=4)
    ours = spec("k8v4-k4v2", world.longest, 1024)
    made = division.divide(world.made(ours, "wwf" * 4, 1 << 30), world.config)
    assert made is not None
    each = WINDOW // BLOCK + 1
    assert made.num_blocks == 1 + 2 * (4 * each + 512 // BLOCK)


def test_a_state_takes_one_block_of_each_group() -> None:
    world = World(max_num_seqs=4)
    ours = spec("k8v4-k4v2", world.longest, 1024)
    made = division.divide(world.made(ours, "sssf" * 4, 1 << 30), world.config)
    assert made is not None
    assert made.num_blocks == 1 + 3 * 4


def test_states_that_are_kept_for_prefix_caching_are_refused() -> None:
    world = World(states="align")
    plan = world.made(spec("k8v4-k4v2", world.longest, 1024), "sssf" * 4, 64 << 20)
    with pytest.raises(ConfigError, match="--no-enable-prefix-caching"):
        division.divide(plan, world.config)


def test_more_layers_with_full_attention_than_others_are_refused() -> None:
    world = World()
    plan = world.made(spec("k8v4", world.longest, 1024, 6), "fffw" * 2, 64 << 20)
    with pytest.raises(ConfigError, match="hardly more of them"):
        division.divide(plan, world.config)
