"""A pool small enough for thousands of operations, and a look into its bytes."""

import numpy as np
import torch

from diffkv import pool, reference
from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig
from diffkv.reference.pages import page_ids
from diffkv.shape import PoolShape
from diffkv.state import TENSORS, PromptTokens

NUM_SLOTS, NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 3, 2, 2, 8
MAX_MODEL_LEN = 16
WINDOW = 3


def make_state(quant, page_bytes, num_pages, num_slots=NUM_SLOTS):
    layout = PageLayout.derive(QuantConfig.parse(quant), HEAD_DIM, page_bytes, 4, drops=True)
    # A leaf names two pages, so that heads of few tokens have several
    shape = PoolShape(layout, NUM_LAYERS, NUM_KV_HEADS, num_slots, MAX_MODEL_LEN, num_pages, 2)
    buffer = torch.empty(shape.table_bytes + num_pages * page_bytes, dtype=torch.uint8)
    return pool.create(shape, buffer, torch.float32, WINDOW)


def num_free(state):
    head, tail = state.ring_ends.tolist()
    return tail - head


def tensors(state):
    """Everything that an operation may change, but the counter of overruns."""
    return {name: getattr(state, name).clone() for name in TENSORS if name != "overruns"}


def assert_only_counted(state, before):
    """An overrun was counted, once, and nothing else happened. Resets the counter."""
    assert int(state.overruns) == 1
    for name, tensor in before.items():
        assert torch.equal(getattr(state, name), tensor), f"{name} changed in an overrun"
    state.overruns.zero_()


def store(ops, state, layer, rows, tiers, sums, key=None):
    """Store `rows` of (slot, positions); tiers and sums are [num_kv_heads][num_tokens]."""
    positions = [position for _, row in rows for position in row]
    lengths = [len(row) for _, row in rows]
    if key is None:
        key = torch.zeros(len(positions), NUM_KV_HEADS, HEAD_DIM)
    tokens = PromptTokens(
        slots=torch.tensor([slot for slot, _ in rows], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        key=key,
        value=-key,
        positions=torch.tensor(positions, dtype=torch.int32),
    )
    tiers = torch.tensor(tiers, dtype=torch.int8)
    ops.store_prompt(state, layer, tokens, tiers, torch.tensor(sums, dtype=torch.float32))


def read(state):
    """(slot, layer, head) -> tier -> (positions, sums, keys, values), straight from the bytes."""
    raw = state.pages.numpy()
    counts = state.num_tokens.numpy()
    views = [_views(state, raw, tier) for tier in range(len(state.layout.tiers))]
    result = {}
    for row in np.ndindex(counts.shape[:3]):
        result[row] = []
        for tier, tier_views in enumerate(views):
            number = np.arange(counts[(*row, tier)])
            number, index = np.divmod(number, state.layout.tiers[tier].tokens_per_page)
            page = page_ids(state, row, tier).numpy()[number]
            result[row].append([view[page, index] for view in tier_views])
    return result


def _views(state, raw, tier):
    """[num_pages, tokens_per_page, ...] of positions, sums, keys and values."""
    layout = state.layout.tiers[tier]
    fmt, tokens = layout.format, layout.tokens_per_page

    def segment(name, dtype):
        offset, num_bytes = layout.regions[name]
        return raw[:, offset : offset + num_bytes].copy().view(dtype).reshape(len(raw), tokens, -1)

    def vectors(side, bits, groups):
        codes = torch.from_numpy(segment(f"{side}_codes", np.uint8)).flatten(0, 1)
        meta = torch.from_numpy(segment(f"{side}_meta", np.float16))
        meta = meta.view(len(codes), 0 if bits == 16 else groups, 2)
        x = reference.dequantize(codes, meta, bits, torch.float32)
        return x.view(len(raw), tokens, HEAD_DIM).numpy()

    positions, sums = segment("positions", np.int32)[..., 0], segment("sums", np.float32)[..., 0]
    keys = vectors("k", fmt.k_bits, fmt.k_groups)
    return positions, sums, keys, vectors("v", fmt.v_bits, fmt.v_groups)
