"""Formats by layer in an engine: lossless ones equal vLLM's own cache, and bytes are what they are."""

import math
from typing import Any

import pytest
from conftest import NEW_TOKENS, engine, greedy
from stepping import Request, check_empty, check_quotas, drive, shipped_prompts, worker

from diffkv.cli import main

LOSSLESS = "0:k16v16,1:k16v16-k8v4,2-:k16v16"
"""Two groups, of which one is not contiguous; with alpha_high 0 its low tier stays empty."""
MIXED = "0:k16v16,1-2:k8v4-k4v2"
SMALL_POOL_BYTES = 14 << 20


def test_lossless_groups_equal_stock(prompts: list[list[int]], stock: list[list[int]]) -> None:
    """With chunked prompts, and with preemptions, which need the quotas of all groups to be right."""
    with engine(
        LOSSLESS,
        {"alpha_high": 0},
        max_model_len=1152,
        max_num_batched_tokens=96,
        kv_cache_memory_bytes=SMALL_POOL_BYTES,
    ) as llm:
        assert [len(group.layers) for group in worker().shape.layout.groups] == [2, 1]
        run = greedy(llm, prompts, NEW_TOKENS)
    assert run.token_ids == stock
    assert run.preemptions > 0


class TestMixed:
    def test_quotas_cover_all_groups_and_bytes_are_those_of_the_tables(self) -> None:
        spent: list[tuple[int, int]] = []

        def look(step: int) -> None:
            check_quotas(llm)
            summary = worker().summary()["totals"]
            spent.append((summary["num_pages"], summary["num_bytes"]))
            for request in worker()._slots.requests.values():
                exact, pair = (g.num_tokens[request.slot] for g in worker().state.groups)
                assert not exact[..., 1].any()
                # nothing is dropped: layers without a low tier keep all that the others demote
                assert (exact.sum(-1)[:, :, None] == pair.sum(-1).flatten()).all()

        requests = {f"r{i}": Request(p, 24) for i, p in enumerate(shipped_prompts())}
        arguments: dict[str, Any] = {"max_num_batched_tokens": 384, "max_model_len": 1280}
        with engine(
            MIXED, {"alpha_high": 3}, dtype="bfloat16", kv_cache_memory_bytes=6 << 20, **arguments
        ) as llm:
            driven = drive(llm, requests, look)
            shape, totals = worker().shape, worker().summary()["totals"]
            check_empty(llm)
        assert all(len(tokens) == 24 for tokens in driven.token_ids.values())
        assert totals["num_requests"] >= len(requests)
        exact, pair = shape.groups
        assert [exact.num_layers, pair.num_layers] == [1, 2]
        # Every request is charged its pages, their entries, and the tables of a slot
        leaf = shape.leaf_entries
        per_page = shape.layout.page_bytes + 4 + -(-4 * (leaf + 1) // leaf)
        expected = totals["num_pages"] * per_page + totals["num_requests"] * shape.slot_bytes
        assert totals["num_bytes"] == expected
        # a token of the exact layer costs as much as in bf16, so at least a third of bf16's bytes
        high, low = totals["high"], totals["low"]
        assert high + low == pytest.approx(totals["num_tokens"])
        bits = (16 * totals["num_tokens"] + 6 * (3 * high - totals["num_tokens"]) + 3 * 3 * low) / 3
        assert totals["nominal_bits"] == pytest.approx(bits)
        bf16 = totals["num_tokens"] * 3 * 2 * 64 * 2 * 2
        assert bits / 16 / totals["num_tokens"] < totals["num_bytes"] / bf16 < 0.75

    def test_one_prompt_holds_the_pages_of_its_tokens(self) -> None:
        prompt = shipped_prompts()[0]
        held: list[int] = []

        def look(step: int) -> None:
            for request in worker()._slots.requests.values():
                held[:] = [worker().accounts.num_held, 0]
                for group in worker().state.groups:
                    counts = group.num_tokens[request.slot]
                    for tier, placed in enumerate(group.layout.tiers):
                        per_page = placed.tokens_per_page
                        held[1] += sum(
                            math.ceil(n / per_page) for n in counts[..., tier].flatten().tolist()
                        )

        with engine(MIXED, {"alpha_high": 3, "alpha_low": 0.5}, dtype="bfloat16") as llm:
            names = [f"model.layers.{i}.self_attn.attn" for i in range(3)]
            (group,) = (
                llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
            )
            assert group.layer_names == names, "layers are numbered in the order of the model"
            drive(llm, {"one": Request(prompt, 12)}, look)
        assert held[0] == held[1] > 0


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ("0:k16v16,1-3:k8v4", "names layer 3, but the model has 3 layers, 0-2"),
        ("0:k16v16,2-:k8v4", "no formats for layer 1"),
        ("0-1:k16v16", "no formats for layer 2"),
    ],
)
def test_other_layers_than_the_models_are_refused(
    capsys: pytest.CaptureFixture[str], quant: str, message: str
) -> None:
    for command in ("generate", "inspect"):
        assert main([command, "--quant", quant]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("diffkv: ") and message in line
