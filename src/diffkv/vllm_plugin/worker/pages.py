"""A pool read token by token, for people who want to look.

It copies counts and positions to the host, and is no part of a step.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkv.policy import DROPPED, HIGH, LOW
from diffkv.quant import ConfigError
from diffkv.reference.pages import page_ids
from diffkv.state import PoolState

__all__ = ["read_pool", "token_tiers"]


def read_pool(
    state: PoolState, requests: Iterable[tuple[Sequence[int], int]]
) -> list[dict[str, Any]]:
    """Every token of some requests.

    Args:
        state: the pool's, which is only read.
        requests: slots of the rows of each, and its tokens so far.

    Returns:
        For each: `num_tokens`, tokens of the request so far; `high`
        and `low`, [num_layers][num_kv_heads] counts; `tiers`, [num_layers][num_kv_heads] strings of one
        digit a token: 0 high, 1 low, 2 dropped.

    Raises:
        ConfigError: the engine does not drop, so that it has no positions of low tokens.
    """
    if not state.layout.drops:
        raise ConfigError("this engine keeps no positions of low tokens: start it with drops")
    read = []
    for rows, num_tokens in requests:
        tiers, counts = (
            token_tiers(state, rows, num_tokens),
            state.num_tokens[list(rows)].sum(0).cpu(),
        )
        read.append(
            {
                "num_tokens": num_tokens,
                "high": counts[..., HIGH].tolist(),
                "low": counts[..., LOW].tolist(),
                "tiers": [["".join(map(str, row)) for row in rows] for rows in tiers.tolist()],
            }
        )
    return read


def token_tiers(state: PoolState, rows: Sequence[int], num_tokens: int) -> Tensor:
    """The tier of every token of a request, for every layer and head.

    Args:
        state: the pool's, which is only read.
        rows: slots of the request's rows.
        num_tokens: tokens of the request so far.

    Returns:
        [num_layers, num_kv_heads, num_tokens] int8 of HIGH, LOW and DROPPED, on the CPU.
    """
    tiers = torch.full(
        (state.num_layers, state.num_kv_heads, num_tokens), DROPPED, dtype=torch.int8
    )
    for tier in (HIGH, LOW)[: len(state.layout.tiers)]:
        for layer in range(state.num_layers):
            for head in range(state.num_kv_heads):
                for slot in rows:
                    tiers[layer, head, _positions(state, (slot, layer, head), tier)] = tier
    return tiers


def _positions(state: PoolState, row: tuple[int, int, int], tier: int) -> Tensor:
    """[tokens] int64 on the CPU: positions of the tokens that a (slot, layer, head) has in a tier."""
    spec = state.layout.tiers[tier]
    offset, num_bytes = spec.regions["positions"]
    stored = state.pages[:, offset : offset + num_bytes].view(torch.int32)
    number = torch.arange(int(state.num_tokens[(*row, tier)]), device=stored.device)
    pages = page_ids(state, row, tier)[number // spec.tokens_per_page]
    return stored[pages, number % spec.tokens_per_page].cpu().long()
