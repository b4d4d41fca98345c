"""What vLLM does on CUDA and not on CPUs, as far as a CPU can show it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from checkpoints import make
from conftest import NEW_TOKENS, engine, greedy
from stepping import Request, check_empty, check_quotas, drive, worker
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group

from diffkv.cache import Step
from diffkv.prefill import Spans, torch_prefill
from diffkv.quant import ConfigError
from diffkv.uploads import at_once
from diffkv.vllm_plugin import engine_args
from diffkv.vllm_plugin.connector import DiffKVConnector
from diffkv.vllm_plugin.front.admission import Admission
from diffkv.vllm_plugin.messages import PagesHeld
from diffkv.vllm_plugin.scheduler.manager import DiffKVManager
from diffkv.vllm_plugin.worker.backend import DiffKVImpl, DiffKVMetadata
from diffkv.vllm_plugin.worker.cache import BatchRows, WorkerCache
from diffkv.vllm_plugin.worker.prefill import choose_prefill
from diffkv.vllm_plugin.worker.runner import follow_batches
from diffkv.vllm_plugin.worker.snapshot import Snapshots


def test_message_after_metadata(
    monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], stock: list[list[int]]
) -> None:
    """vLLM's second model runner builds a step's metadata before the worker gets its message."""
    messages: list[Any] = []
    deliver = DiffKVConnector.handle_preemptions
    bind = DiffKVConnector.bind_connector_metadata

    def hold(self: DiffKVConnector, message: Any) -> None:
        if message.num_tokens:
            messages.append(message)
        else:  # no model runs in this step
            deliver(self, message)

    def before_forward(self: DiffKVConnector, message: Any) -> None:
        if messages:
            deliver(self, messages.pop())
        bind(self, message)

    monkeypatch.setattr(DiffKVConnector, "handle_preemptions", hold)
    monkeypatch.setattr(DiffKVConnector, "bind_connector_metadata", before_forward)
    with engine("k16v16", max_num_batched_tokens=256) as llm:
        run = greedy(llm, prompts[:12], NEW_TOKENS)
    assert run.token_ids == stock[:12]
    assert not messages


def test_dummy_run_without_a_message(
    monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], stock: list[list[int]]
) -> None:
    """Runners warm up, capture graphs, and wait for other replicas by such runs."""
    plan, forward = DiffKVMetadata.plan, DiffKVImpl.forward
    planned: list[Any] = []

    def count(self: DiffKVMetadata) -> Step:
        planned.append(self)
        return plan(self)

    def poisoned(self: DiffKVImpl, *args: Any, **kwargs: Any) -> Tensor:
        kwargs["output"].fill_(torch.nan)
        output = forward(self, *args, **kwargs)
        assert output.isfinite().all()
        return output

    monkeypatch.setattr(DiffKVMetadata, "plan", count)
    monkeypatch.setattr(DiffKVImpl, "forward", poisoned)
    with engine("k16v16", max_num_batched_tokens=256) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner

        for prompt, tokens in zip(prompts[:3], stock, strict=False):
            num_steps = len(planned)
            runner._dummy_run(2 * runner.max_num_reqs, force_attention=True)
            assert len(planned) == num_steps + 1
            check_empty(llm)
            assert drive(llm, {"r": Request(prompt, 8)}).token_ids["r"] == tokens[:8]
    assert len(planned) == len(set(map(id, planned))), "a step was planned twice"


def test_a_run_before_there_is_a_pool() -> None:
    """vLLM measures what graphs take with a KV cache of its own making, which no connector hears of."""
    with engine("k16v16") as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        layers = runner.compilation_config.static_forward_context.values()
        cache = worker()
        for layer in layers:
            layer.impl.worker = None
        (group,), builds = runner.attn_groups[0], []
        builder = group.get_metadata_builder()
        build = builder.build

        def noted(*args: Any, **kwargs: Any) -> Any:
            builds.append(build(*args, **kwargs))
            return builds[-1]

        builder.build = noted
        runner._dummy_run(8, force_attention=True)
        runner._dummy_run(8, force_attention=True, is_graph_capturing=True)
        assert builds == [None, None]
        for layer in layers:
            layer.impl.worker = cache
        check_empty(llm)


def test_warm_up_numbers_requests_by_blocks_of_vllms(tmp_path: Path) -> None:
    """Which are more than the blocks of account of ours, where other layers keep most of the memory."""
    little = {"kv_cache_memory_bytes": 16 << 20, "max_model_len": 512, "max_num_seqs": 8}
    with engine("k16v16", model=str(make("falcon_h1", tmp_path)), **little) as llm:
        connector = get_kv_transfer_group()
        config = llm.llm_engine.vllm_config
        layers = config.compilation_config.static_forward_context
        caches = {name: layer.kv_cache for name, layer in layers.items()}
        num_blocks = connector.worker.state.num_pages + 1
        cache = WorkerCache(
            caches,
            connector._options,
            config,
            replace(connector._kv_cache_config, num_blocks=num_blocks),
            connector._division,
        )
        ids = torch.tensor([1, num_blocks - 1], dtype=torch.int32)
        step = cache.plan(BatchRows(ids, np.arange(3), torch.ones(2, dtype=torch.int32)))
        assert step.decode.slots.tolist() == [-1, -1]


def test_no_whole_graph_has_a_prompt_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM counts the last token of a prompt as a generated one, where it is computed by itself."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    count, batches = GPUModelRunner.gather_batch_req_state, []
    monkeypatch.setattr(GPUModelRunner, "gather_batch_req_state", count)
    config, worker = SimpleNamespace(), Mock(note_batch=batches.append)
    step = SimpleNamespace(
        num_scheduled_tokens={"a": 1, "b": 1},
        total_num_scheduled_tokens=2,
        scheduled_spec_decode_tokens={},
    )

    def tokens_each(connector: str, num_computed: list[int]) -> int | None:
        """Of each request, if a whole graph may be replayed."""
        transfer = SimpleNamespace(kv_connector=connector, kv_connector_extra_config={})
        config.kv_transfer_config = transfer
        runner = SimpleNamespace(
            vllm_config=config,
            decode_query_len=1,
            use_pp=False,
            pcp_manager=None,
            adaptive_verification=None,
            req_states=SimpleNamespace(
                req_id_to_index={"a": 0, "b": 1},
                prefill_len=SimpleNamespace(np=np.array([100, 50])),
                num_computed_prefill_tokens=np.array(num_computed),
            ),
        )
        batches.clear()
        return GPUModelRunner.gather_batch_req_state(runner, step, False)[1]

    assert tokens_each("DiffKVConnector", [99, 50]) == 1
    for _ in range(2):
        follow_batches(config, worker)
        assert tokens_each("DiffKVConnector", [99, 50]) is None
        assert sorted(*batches) == ["a", "b"]
        assert tokens_each("DiffKVConnector", [100, 50]) == 1
        assert sorted(*batches) == ["a", "b"]
        assert tokens_each("OffloadingConnector", [99, 50]) == 1
        assert not batches


def test_a_batch_of_which_all_is_known_asks_the_device_nothing(
    monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], stock: list[list[int]]
) -> None:
    """The second runner says whose rows there are; with the first one the device is asked."""
    split, compared = WorkerCache._split, []

    def told(self: WorkerCache, slots: Tensor, starts: np.ndarray, lens: Tensor) -> Any:
        names = {request.slot: name for name, request in self._scheduled.items()}
        asked = split(self, slots, starts, lens)
        self.note_batch([names[slot] for slot in slots.tolist()])
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "cpu", None)
            chunks, index, places, passing = split(self, slots, starts, lens)
        assert (chunks, index.tolist()) == (asked[0], asked[1].tolist())
        assert (str(places), passing) == (str(asked[2]), [])
        compared.append(len(chunks))
        return chunks, index, places, passing

    monkeypatch.setattr(WorkerCache, "_split", told)
    with engine("k16v16", max_num_batched_tokens=256) as llm:
        run = greedy(llm, prompts[:12], NEW_TOKENS)
    assert run.token_ids == stock[:12]
    assert len(compared) > 3 and max(compared) > 1


def test_reports_a_step_late(
    monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], stock: list[list[int]]
) -> None:
    """A worker does not wait for its device; some requests are preempted before they are reported."""
    init, on_report = Snapshots.__init__, DiffKVManager.on_report
    stale = []

    def late(self: Snapshots, cache: Any, late: bool) -> None:
        init(self, cache, late=True)

    def count(self: DiffKVManager, request_id: str, report: PagesHeld) -> None:
        running = self._running.get(request_id)
        stale.append(running is None or report.epoch != running.epoch)
        on_report(self, request_id, report)

    monkeypatch.setattr(Snapshots, "__init__", late)
    monkeypatch.setattr(DiffKVManager, "on_report", count)
    with engine(
        "k16v16",
        {"admission": "worst-case"},
        max_model_len=1152,
        kv_cache_memory_bytes=14 << 20,
        max_num_batched_tokens=512,
    ) as llm:
        requests = {f"r{i}": Request(prompt, NEW_TOKENS) for i, prompt in enumerate(prompts)}
        driven = drive(llm, requests, lambda step: check_quotas(llm))
        gauges, kept = worker().accounts.gauges(), sum(worker()._rows.lengths.values())
    assert [driven.token_ids[name] for name in requests] == stock
    assert any(stale) and not all(stale)
    assert gauges["tokens_high"] == kept  # the last step reports at once


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
    return_softmax_lse: bool,
    out: Tensor,
    fa_version: int,
) -> tuple[Tensor, Tensor]:
    """Plain arithmetic behind flash-attention's signature: the mask is aligned at the end."""
    assert causal and return_softmax_lse and fa_version == 3
    lse = []
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    starts = zip(
        cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True
    )
    for q0, q1, k0, k1 in starts:
        group = q.shape[1] // k.shape[1]
        keys, values = (x[k0:k1].double().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1].double(), keys) * softmax_scale
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(
            scores.shape[2] - scores.shape[1]
        )
        scores = scores.masked_fill(~seen, float("-inf"))
        out[q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        lse.append(scores.logsumexp(-1))
    return out, torch.cat(lse, 1).float()


def test_prefill_by_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is passed to flash-attention gives what torch gives, request by request."""
    from vllm.v1.attention.backends import fa_utils

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: 3)
    prefill = choose_prefill("cuda", torch.bfloat16, 64)
    assert prefill is not torch_prefill

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    generator = torch.Generator().manual_seed(0)
    for lengths in ([(5, 5)], [(7, 30), (1, 64), (12, 12)]):
        spans = Spans.of(*zip(*lengths, strict=True), at_once(torch.device("cpu")))
        query = draw(sum(spans.num_queries), 8, 64)
        key, value = (draw(sum(spans.num_keys), 2, 64) for _ in range(2))
        ours, torchs = torch.empty_like(query), torch.empty_like(query)
        lse = prefill(query, key, value, spans, 0.125, ours)
        assert lse is not None and lse.shape == (8, len(query))
        torch_prefill(query, key, value, spans, 0.125, torchs)
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=1e-2)


def test_prefill_by_torch() -> None:
    assert choose_prefill("cuda", torch.float32, 64) is torch_prefill


def test_both_runners_take_the_admission_check() -> None:
    """Each model runner has an interface of its own for it, and refuses a class of the other."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
    from vllm.v1.worker.gpu.sample.logits_processor.loader import (
        build_custom_logits_processors_params_validator,
    )

    names = engine_args("k8v4")["logits_processors"]
    good = SamplingParams(extra_args={"diffkv": "off"})
    bad = SamplingParams(extra_args={"diffkv_alpha_high": "x"})
    second = build_custom_logits_processors_params_validator(names)
    for check in (second, lambda params: validate_logits_processors_parameters(names, params)):
        check(good)
        with pytest.raises(VLLMValidationError, match="diffkv_alpha_high"):
            check(bad)
    ours, others = (
        SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector=name, kv_connector_extra_config={})
        )
        for name in ("DiffKVConnector", "OffloadingConnector")
    )
    assert not Admission(ours, None).add_request(0, good)
    Admission(ours, torch.device("cpu"), False).update_state(None)
    with pytest.raises(ConfigError, match="DiffKV's connector was replaced"):
        Admission(others, None)
