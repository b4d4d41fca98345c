"""What requests keep, token by token, read from a worker's pool.

For people who want to look: it copies counts and positions to the host, and is no part of a step.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffkv.policy import DROPPED, HIGH, LOW
from diffkv.quant import ConfigError
from diffkv.reference.pages import page_ids
from diffkv.state import PoolState
from diffkv.vllm_plugin.options import Options

__all__ = ["Insight", "inspect", "read_pool", "token_tiers"]


def token_tiers(state: PoolState, slot: int, num_tokens: int) -> Tensor:
    """The tier of every token of a request, for every layer and head.

    Args:
        state: of the pool; not modified.
        slot: of the request.
        num_tokens: of the request so far.

    Returns:
        [num_layers, num_kv_heads, num_tokens] int8 of HIGH, LOW and DROPPED, on the CPU.
    """
    tiers = torch.full(
        (state.num_layers, state.num_kv_heads, num_tokens), DROPPED, dtype=torch.int8
    )
    counts = state.num_tokens[slot].cpu()
    for tier in (HIGH, LOW)[: len(state.layout.tiers)]:
        stored = _positions(state, tier)
        per_page = state.layout.tiers[tier].tokens_per_page
        for layer in range(state.num_layers):
            for head in range(state.num_kv_heads):
                number = torch.arange(int(counts[layer, head, tier]))
                pages = page_ids(state, (slot, layer, head), tier).cpu()[number // per_page]
                positions = stored[pages.to(stored.device), number % per_page].cpu().long()
                tiers[layer, head, positions] = tier
    return tiers


def _positions(state: PoolState, tier: int) -> Tensor:
    """[num_pages, tokens_per_page] int32, a view: what each page would say if it were of a tier."""
    offset, num_bytes = state.layout.tiers[tier].segments["positions"]
    return state.pages[:, offset : offset + num_bytes].view(torch.int32)


def read_pool(state: PoolState) -> list[dict[str, Any]]:
    """Every request that holds tokens, by slot.

    Returns:
        For each: `num_tokens`, of the request so far (its newest token is always kept); `high` and
        `low`, [num_layers][num_kv_heads] counts; `tiers`, [num_layers][num_kv_heads] strings of one
        digit a token: 0 high, 1 low, 2 dropped.

    Raises:
        ConfigError: the engine does not drop, so that it has no positions of low tokens.
    """
    if not state.layout.drops:
        raise ConfigError("this engine keeps no positions of low tokens: start it with drops")
    requests = []
    for slot in torch.nonzero(state.num_tokens.sum((1, 2, 3)) > 0)[:, 0].tolist():
        num_tokens = _newest(state, slot) + 1
        tiers, counts = token_tiers(state, slot, num_tokens), state.num_tokens[slot].cpu()
        requests.append(
            {
                "num_tokens": num_tokens,
                "high": counts[..., HIGH].tolist(),
                "low": counts[..., LOW].tolist(),
                "tiers": [["".join(map(str, row)) for row in rows] for rows in tiers.tolist()],
            }
        )
    return requests


def _newest(state: PoolState, slot: int) -> int:
    """Largest position of a request: in the high tier of any head."""
    number = torch.arange(int(state.num_tokens[slot, 0, 0, HIGH]))
    per_page = state.layout.tiers[HIGH].tokens_per_page
    pages = page_ids(state, (slot, 0, 0), HIGH).cpu()[number // per_page]
    stored = _positions(state, HIGH)
    return int(stored[pages.to(stored.device), number % per_page].max())


@dataclass(frozen=True)
class Insight:
    """What one request kept.

    Attributes:
        texts: of its tokens, one each.
        high: [num_layers][num_kv_heads], high tokens of each head, over all ranks.
        low: likewise.
        tiers: [num_layers][num_kv_heads], a string of one digit a token, see `read_pool`.
    """

    texts: list[str]
    high: list[list[int]]
    low: list[list[int]]
    tiers: list[list[str]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the request that have been stored: all but the one that was generated last."""
        return len(self.texts)


def inspect(
    prompts: Sequence[str], arguments: dict[str, Any], options: Options, max_tokens: int
) -> list[Insight]:
    """Run prompts one after the other, and look at each before its pages are released.

    Args:
        prompts: texts.
        arguments: of vLLM's engine, the model among them.
        options: DiffKV's; the engine keeps every token's position, whatever they say of drops.
        max_tokens: new tokens of each; with 1 it is seen as the prompt left it.

    Raises:
        ConfigError: the engine cannot start, or a prompt does not fit the model.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError

    from diffkv.vllm_plugin import engine_args
    from diffkv.vllm_plugin.front import offline

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    insights = []
    with offline.engine(arguments | engine_args(**replace(options, drops=True).to_dict())) as llm:
        tokenizer = llm.get_tokenizer()
        for prompt in prompts:
            try:
                (output,) = llm.generate([prompt], params, use_tqdm=False)
            except (ValueError, VLLMClientError) as error:
                raise ConfigError(offline.first_line(error)) from error
            # Pages go back with the next step's message, so a finished request is still there.
            ranks = [rank for (rank,) in llm.collective_rpc("diffkv_insight")]
            num_tokens = ranks[0]["num_tokens"]
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids][:num_tokens]
            insights.append(
                Insight(
                    [tokenizer.decode([i]) for i in ids],
                    *(
                        _join_heads([rank[name] for rank in ranks])
                        for name in ("high", "low", "tiers")
                    ),
                )
            )
    return insights


def _join_heads(ranks: list[list[list[Any]]]) -> list[list[Any]]:
    """[num_layers][num_kv_heads] of all ranks, from each rank's own."""
    return [[head for heads in layer for head in heads] for layer in zip(*ranks, strict=True)]
