"""Policies and scores that kvpress has too agree with what `tools/kvpress_oracle.py` recorded of it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffkv import policies, reference
from diffkv.lab.evaluation import baselines
from diffkv.policy import DROPPED, Thresholds, key_difference

ORACLE = Path(__file__).parent / "data" / "kvpress.safetensors"


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    return load_file(ORACLE)


@pytest.fixture(scope="module")
def facts() -> dict[str, str]:
    with safe_open(ORACLE, "pt") as file:
        return file.metadata()


def mean_significance(oracle: dict[str, Tensor], num_queries: int) -> Tensor:
    """[num_kv_heads, N] float32, as a policy gets it."""
    query, key = (oracle[name].transpose(0, 1) for name in ("query", "key"))
    num_tokens = len(key)
    starts = torch.tensor([0, num_tokens], dtype=torch.int32)
    scale = key.shape[-1] ** -0.5
    sums = reference.significance(
        query, key, starts, starts, starts, num_tokens, scale, num_queries
    )
    return sums / torch.arange(num_tokens, 0, -1).clamp(max=num_queries)


def test_significance_is_snapkvs_score(oracle: dict[str, Tensor], facts: dict[str, str]) -> None:
    window = int(facts["window"])
    ours = mean_significance(oracle, window)[:, :-window]
    torch.testing.assert_close(ours, oracle["snapkv_scores"][:, :-window], rtol=1e-4, atol=1e-6)


def test_significance_of_all_queries_is_the_observed_attention(oracle: dict[str, Tensor]) -> None:
    ours = mean_significance(oracle, policies.ALL_QUERIES)
    torch.testing.assert_close(ours, oracle["observed_scores"], rtol=1e-4, atol=1e-6)


def test_key_difference_is_keydiffs_score(oracle: dict[str, Tensor]) -> None:
    torch.testing.assert_close(key_difference(oracle["key"]), oracle["keydiff_scores"])


@pytest.mark.parametrize(
    ("policy", "press"),
    [("topk", "snapkv"), ("topk-adaptive", "adakv"), ("window", "streaming")],
)
def test_what_stays_is_what_the_press_keeps(
    policy: str, press: str, oracle: dict[str, Tensor], facts: dict[str, str]
) -> None:
    window, keep = int(facts["window"]), 1 - float(facts["ratio"])
    sinks = f",sinks={facts['sinks']}" if policy == "window" else ""
    decide = baselines.parse(f"{policy}:keep={keep}{sinks}").tiers
    tiers = decide(mean_significance(oracle, window), Thresholds(), window)
    assert torch.equal(tiers != DROPPED, oracle[f"{press}_kept"])
