"""Runs prompts, and has the workers read what each keeps, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffkv.vllm_plugin.front.offline import (
    engine,
    engine_arguments,
    expected_lengths,
    requests_in_one_line,
)
from diffkv.vllm_plugin.options import Options

__all__ = ["Insight", "inspect", "summarize"]


@dataclass(frozen=True)
class Insight:
    """The tokens of one request.

    Attributes:
        texts: each token's text.
        high: [num_layers][num_kv_heads], high tokens of each head, over all ranks.
        low: [num_layers][num_kv_heads], low tokens of each head.
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
        arguments: arguments of vLLM's engine, the model among them.
        options: DiffKV's; the engine keeps every token's position, whatever they say of drops.
        max_tokens: new tokens of each; with 1 it is seen as the prompt left it.

    Raises:
        ConfigError: the engine cannot start, or a prompt does not fit the model.
    """
    args = engine_arguments(arguments, replace(options, drops=True))
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    insights = []
    lengths = expected_lengths(prompts, [{"max_tokens": max_tokens}] * len(prompts))
    with engine(args, [max(lengths)]) as llm:  # one prompt at a time
        tokenizer = llm.get_tokenizer()
        for prompt in prompts:
            with requests_in_one_line():
                (output,) = llm.generate([prompt], params, use_tqdm=False)
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


def summarize(insights: Sequence[Insight]) -> dict[str, Any]:
    """What prompts kept: shares of each layer and head over all of them, and the counts of each.

    Shares are of the tokens of all prompts, [num_layers][num_kv_heads] for each tier.
    """
    num_tokens = sum(insight.num_tokens for insight in insights)
    num_layers, num_heads = len(insights[0].high), len(insights[0].high[0])
    shares = {
        tier: [
            [
                sum(getattr(insight, tier)[layer][head] for insight in insights) / num_tokens
                for head in range(num_heads)
            ]
            for layer in range(num_layers)
        ]
        for tier in ("high", "low")
    }
    shares["dropped"] = [
        [max(0.0, 1 - high - low) for high, low in zip(highs, lows, strict=True)]
        for highs, lows in zip(shares["high"], shares["low"], strict=True)
    ]
    return {
        "num_layers": num_layers,
        "num_kv_heads": num_heads,
        "num_tokens": num_tokens,
        "mean": {
            tier: sum(map(sum, rows)) / (num_layers * num_heads) for tier, rows in shares.items()
        },
        "shares": shares,
        "prompts": [
            {"num_tokens": insight.num_tokens, "high": insight.high, "low": insight.low}
            for insight in insights
        ],
    }
