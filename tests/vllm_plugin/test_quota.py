"""The scheduler's side: quotas cover the pages held, shrink with them, and all come back."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import stepping
from conftest import engine, metric, random_prompts
from prometheus_client import REGISTRY
from stepping import Request, check_empty, check_quotas, drive, scheduler, worker

QUANT = "k8v4-k4v2"
CHUNK = 192
MODEL_LEN = 1280


@pytest.fixture(scope="class")
def llm() -> Iterator[Any]:
    """Chunked prompts, and a pool that some ten of them nearly fill."""
    with engine(
        QUANT,
        {"alpha_high": 3, "alpha_low": 0.3, "segment": 256},
        max_model_len=MODEL_LEN,
        max_num_batched_tokens=CHUNK,
        kv_cache_memory_bytes=5 << 19,
        watermark=0.0,  # admission may fill the pool
    ) as llm:
        yield llm


def gauge(name: str) -> float:
    """One of ours; vLLM's `get_metrics` shows only its own."""
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        if metric.name == f"diffkv_{name}"
        for sample in metric.samples
    )


def requests(num: int, new_tokens: int = 40, longest: int = 700) -> dict[str, Request]:
    prompts = random_prompts(num, longest, seed=num)
    return {f"r{i}": Request(prompt, new_tokens) for i, prompt in enumerate(prompts)}


class TestOneEngine:
    def test_quota_covers_pages_after_every_step(self, llm: Any) -> None:
        peak = 0.0

        def look(step: int) -> None:
            nonlocal peak
            check_quotas(llm)
            peak = max(peak, scheduler(llm).kv_cache_manager.usage)

        before = metric(llm, "vllm:num_preemptions")
        driven = drive(llm, requests(16), look)
        assert all(len(tokens) == 40 for tokens in driven.token_ids.values())
        assert peak > 0.85, "the pool was not nearly full at any time"
        assert metric(llm, "vllm:num_preemptions") >= before
        check_empty(llm)

    def test_a_segment_and_a_chunk_of_a_prompt_are_uncompressed_at_most(self, llm: Any) -> None:
        paid: list[int] = []

        def look(step: int) -> None:
            if scheduler(llm).running:
                paid.append(stepping.blocks_in_use(llm))

        prompt = stepping.shipped_prompts()[0]
        drive(llm, {"one": Request(prompt, new_tokens=8)}, look)
        shape = worker().shape
        exact = shape.layout.exact().high.tokens_per_page
        uncompressed = shape.num_kv_heads * math.ceil(1071 / exact)
        assert max(paid) < 0.7 * uncompressed
        assert paid[-1] < 0.3 * uncompressed
        check_empty(llm)

    def test_usage_gauge_and_ours_agree(self, llm: Any) -> None:
        seen = []

        def look(step: int) -> None:
            usage = metric(llm, "vllm:kv_cache_usage_perc")
            held, total, free = map(gauge, ("pages_held", "pages_total", "pages_free"))
            seen.append((usage, held))
            assert held + free == total == worker().state.num_pages
            assert held == worker().accounts.num_held
            # vLLM takes its gauge in the same step, after requests that finished gave theirs back
            layers = worker().shape.num_layers
            assert usage == pytest.approx(stepping.blocks_in_use(llm) / stepping.usable_blocks(llm))
            running = {r.request_id for r in scheduler(llm).running}
            used = [r.rows for name, r in worker().requests.items() if name in running]
            slots = {slot for rows in used for slot in rows}
            covered = int(worker().state.num_pages_held[sorted(slots)].sum())
            assert covered <= usage * stepping.usable_blocks(llm) * layers + 1e-6

        drive(llm, requests(6), look)
        assert max(usage for usage, _ in seen) > 0.3
        assert metric(llm, "vllm:kv_cache_usage_perc") == 0
        assert gauge("pages_held") == worker().accounts.num_held  # rows that are kept

    @pytest.mark.parametrize("when", ["queued", "prefilling", "decoding"])
    def test_abort_leaves_nothing_behind(self, llm: Any, when: str) -> None:
        others = requests(4, new_tokens=30, longest=150)
        alone = drive(llm, others).token_ids
        victim = Request(stepping.shipped_prompts()[0], new_tokens=200)
        aborted_as = []

        def abort(step: int) -> None:
            if aborted_as:
                return
            known = {stepping.outside_name(k): r for k, r in scheduler(llm).requests.items()}
            request = known["victim"]
            state = (
                "queued"
                if request.num_computed_tokens == 0
                else "prefilling"
                if request.num_computed_tokens < request.num_prompt_tokens
                else "decoding"
            )
            if state == when and (when != "decoding" or request.num_output_tokens >= 5):
                llm.llm_engine.abort_request(["victim"])
                aborted_as.append(state)

        # added last, it waits until the prompts before it are through
        driven = drive(llm, {**others, "victim": victim}, abort)
        assert aborted_as == [when]
        assert {name: driven.token_ids[name] for name in others} == alone
        assert len(driven.token_ids.get("victim", [])) < 200
        check_empty(llm)

    def test_aborting_everything_frees_everything(self, llm: Any) -> None:
        many = requests(16)

        def abort(step: int) -> None:
            if step == 12:
                llm.llm_engine.abort_request(list(many))

        drive(llm, many, abort)
        check_empty(llm)


BUDGET_BYTES = 12 << 20
NUM_REQUESTS = 56
NEW_TOKENS = 48


def test_more_requests_run_at_once_in_the_same_bytes() -> None:
    """Of the shipped workload, by about the ratio that a run measures, without more preemptions."""
    prompts = stepping.shipped_prompts()
    workload = {
        f"r{i}": Request(prompts[i % len(prompts)], NEW_TOKENS) for i in range(NUM_REQUESTS)
    }
    arguments = {
        "dtype": "bfloat16",
        "max_model_len": 1280,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": BUDGET_BYTES,
    }
    with engine(**arguments) as llm:
        stock = drive(llm, workload)
        stock_preemptions = metric(llm, "vllm:num_preemptions")
    with engine(QUANT, **arguments) as llm:
        ours = drive(llm, workload)
        preemptions = metric(llm, "vllm:num_preemptions")
        totals = worker().summary()["totals"]
        pool = worker().summary()["pool"]
    ratio = pool["bf16_bytes_per_token"] * totals["num_tokens"] / totals["num_bytes"]
    assert ratio > 2.5
    assert ours.running_peak >= 0.85 * ratio * stock.running_peak, (ratio, ours, stock)
    assert preemptions <= stock_preemptions
    assert len(ours.token_ids) == len(stock.token_ids) == NUM_REQUESTS
