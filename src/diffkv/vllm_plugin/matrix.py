"""What works with DiffKV and what is refused: one table, for start-up checks and docs/support-matrix.md.

Nothing here imports vLLM. `python tools/support_matrix.py` writes the page anew.
"""

from collections.abc import Mapping
from typing import Any

import torch

from diffkv.model_config import weight_formats
from diffkv.quant import ConfigError
from diffkv.vllm_plugin import layers
from diffkv.vllm_plugin.matrix_models import MODELS
from diffkv.vllm_plugin.matrix_row import (
    FAMILIES,
    NOT_TRIED,
    REFUSALS,
    REFUSED,
    TESTS,
    TRIED,
    WORKS,
    Row,
)

__all__ = ["CONNECTOR", "MATRIX", "refuse", "to_markdown"]

CONNECTOR = "DiffKVConnector"
"""Name of DiffKV's KV connector in a vLLM configuration."""

_WEIGHTS = (f"{TESTS}test_weights.py::test_format_is_served_as_by_stock",)
_LOSSLESS = (f"{TESTS}test_lossless.py::test_tokens_equal_stock",)
_PROCESSES = (f"{TESTS}test_lossless.py::test_tokens_equal_stock_in_several_processes",)


def _has_context_parallelism(config: Any) -> bool:
    parallel = config.parallel_config
    return parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1


def _has_experts_on_cpus(config: Any) -> bool:
    on_cpu = config.device_config.device_type == "cpu"
    return on_cpu and bool(config.parallel_config.enable_expert_parallel)


def _has_int4_without_avx512(config: Any) -> bool:
    if config.device_config.device_type != "cpu" or torch.cpu._is_avx512_supported():
        return False
    model = config.model_config
    quantised = getattr(model.hf_config, "quantization_config", None) or getattr(
        model.hf_text_config, "quantization_config", None
    )
    return isinstance(quantised, Mapping) and any(
        bits == 4 for bits, _ in weight_formats(quantised)
    )


def _has_another_connector(config: Any) -> bool:
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector != CONNECTOR


def _recomputes_failures(config: Any) -> bool:
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_load_failure_policy != "fail"


def _publishes_events(config: Any) -> bool:
    events = config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


_FEATURES = (
    Row(
        "features", "chunked prefill", WORKS, "decided segment by segment, as if it had come at once",
        "", _LOSSLESS,
    ),
    Row(
        "features", "prompts longer than the pool holds uncompressed", WORKS,
        "one that is too large even compressed ends alone, with an error", "",
        (f"{TESTS}test_prefix_caching.py::test_twice_what_the_pool_could_hold_uncompressed",),
    ),
    Row("features", "preemption", WORKS, "by recomputation", "", _LOSSLESS),
    Row("features", "several processes (vLLM's default)", WORKS, "", "", _PROCESSES),
    Row(
        "features", "logprobs", WORKS, "", "",
        (
            f"{TESTS}test_server.py::test_completion_and_logprobs",
            f"{TESTS}test_error_bound.py::test_logits_within_bound",
        ),
    ),
    Row(
        "features", "several answers (n > 1), stop strings", WORKS, "each answer has pages of its own",
        "", (f"{TESTS}test_server.py::test_stop_and_several_answers",),
    ),
    Row(
        "features", "chat, streaming, cancelled streams", WORKS, "", "",
        (
            f"{TESTS}test_server.py::test_chat",
            f"{TESTS}test_server.py::test_streaming_equals_the_whole",
            f"{TESTS}test_server.py::test_clients_that_disconnect",
        ),
    ),
    Row(
        "features", "prompts that come in parts (streaming input)", WORKS,
        "each part is computed with all before it", "",
        (
            f"{TESTS}test_sessions.py::test_sessions_are_answered_and_the_engine_lives",
            f"{TESTS}test_sessions.py::test_each_part_is_an_admission_of_its_own",
        ),
    ),
    Row(
        "features", "thresholds of a request", WORKS,
        "bad values are answered with HTTP 400; alpha_low takes an engine with --drops", "",
        (
            f"{TESTS}test_requests.py::test_each_alone_gives_the_same",
            f"{TESTS}test_server.py::test_bad_settings",
        ),
    ),
    Row(
        "features", "prompts of embeddings (--enable-prompt-embeds)", WORKS, "", "",
        (f"{TESTS}test_multimodal.py::test_prompts_of_embeddings_equal_stock",),
    ),
    Row(
        "features", "structured output", WORKS, "choice, regex and JSON schema, with xgrammar", "",
        (f"{TESTS}test_features.py::test_structured_output",),
    ),
    Row(
        "features", "LoRA", WORKS, "the cache does not see weights", "",
        (f"{TESTS}test_features.py::test_lora",),
    ),
    Row(
        "features", "beam search", WORKS,
        "each step computes what follows the last closed row of each beam's text: slow; takes no "
        "`diffkv` settings", "",
        (f"{TESTS}test_features.py::test_beam_search",),
    ),
    Row(
        "features", "sleep mode", REFUSED, "the pool's tables are in the memory that sleep gives up",
        "leave out --enable-sleep-mode", REFUSALS,
        lambda config: config.model_config.enable_sleep_mode,
    ),
    Row(
        "features", "prefix caching", WORKS,
        "requests share closed rows: segments, first messages, prompts, earlier turns", "",
        (f"{TESTS}test_prefix_caching.py::test_turns_and_branches_equal_stock",),
    ),
    Row(
        "features", "speculative decoding", REFUSED, "rejected tokens would have to be taken back",
        "leave out --speculative-config",
        (f"{TESTS}test_bad_input.py::test_flags_that_do_not_go_together", *REFUSALS),
        lambda config: config.speculative_config is not None,
        "speculative decoding (rejected tokens would have to be taken back)",
    ),
    Row(
        "features", "kv_cache_dtype other than auto", REFUSED, "formats are set by --quant",
        "leave it at auto, formats are set by quant",
        (f"{TESTS}test_bad_input.py::test_options", *REFUSALS),
        lambda config: config.cache_config.cache_dtype != "auto",
        "--kv-cache-dtype {config.cache_config.cache_dtype}",
    ),
    Row(
        "features", "prefix caching where only some layers have full attention", REFUSED,
        "rows of the one kind of layers and blocks of the other do not end at the same tokens; where "
        "nobody asks for it, it is off",
        "leave out --enable-prefix-caching", (f"{TESTS}test_divided.py::test_refusals",),
    ),
    Row(
        "features", "one kind of cache for layers of several kinds", REFUSED,
        "DiffKV's would have to be that of windows and states too",
        "leave out --disable-hybrid-kv-cache-manager",
        (f"{TESTS}test_divided.py::test_refusals", *REFUSALS),
        layers.is_divided_under_one_manager,
        "--disable-hybrid-kv-cache-manager where only some layers have full attention",
    ),
    Row(
        "features", "another KV connector", REFUSED,
        "DiffKV is one, and vLLM has one; --kv-offloading-size asks for one too",
        "leave out --kv-transfer-config and --kv-offloading-size",
        (f"{TESTS}test_bad_input.py::test_flags_that_do_not_go_together", *REFUSALS),
        _has_another_connector,
        "the KV connector {config.kv_transfer_config.kv_connector} beside its own",
    ),
    Row(
        "features", "requests that are computed again where they are too large", REFUSED,
        "it would not help: they end with an error", 'leave kv_load_failure_policy at "fail"', REFUSALS,
        _recomputes_failures,
    ),
    Row(
        "features", "routed experts in answers (--enable-return-routed-experts)", REFUSED,
        "vLLM takes them by whole blocks, and rows that are found end anywhere",
        "leave out --enable-return-routed-experts", REFUSALS,
        lambda config: config.aux_output_config.enabled,
    ),
    Row(
        "features", "gRPC (--grpc), the front end in Rust (VLLM_USE_RUST_FRONTEND)", REFUSED,
        "`diffkv serve` checks settings of requests where HTTP comes into Python", "leave them out",
        (f"{TESTS}test_config_file.py::test_a_server_refuses_other_front_ends",),
    ),
    Row(
        "features", "KV cache events (--kv-events-config)", REFUSED,
        "they name blocks of vLLM's, and rows are none", "leave out --kv-events-config", REFUSALS,
        _publishes_events,
    ),
)  # fmt: skip

_VERSIONS = (
    Row("versions", "vLLM 0.32", WORKS, "every test on this page runs with it", "", FAMILIES),
    Row(
        "versions", "vLLM 0.33", TRIED,
        "accepted: a test compares all names that DiffKV relies on with its wheel. Engines were run "
        "with its Python files over the CPU kernels of 0.32 ([what ran](vllm.md#two-versions)); not "
        "run: its own builds, and a GPU",
    ),
    Row(
        "versions", "another version of vLLM", REFUSED, "the plugin knows its internals",
        "install the version that the message names",
        (
            f"{TESTS}test_bad_input.py::test_vllm_that_is_not_supported",
            f"{TESTS}test_vllm_signatures.py::test_other_versions_are_refused",
        ),
    ),
)  # fmt: skip

_PARALLELISM = (
    Row(
        "parallelism", "tensor parallelism", WORKS, "2 ranks; each has the pool of its heads", "",
        (f"{TESTS}test_parallel.py::test_two_ranks_equal_one",),
    ),
    Row(
        "parallelism", "pipeline parallelism", REFUSED, "a pool holds all layers of a model",
        "use --tensor-parallel-size instead",
        (
            f"{TESTS}test_parallel.py::test_other_parallelism_is_refused_in_process",
            f"{TESTS}test_parallel.py::test_pipeline_parallelism_is_one_line_on_the_command_line",
            *REFUSALS,
        ),
        lambda config: config.parallel_config.pipeline_parallel_size > 1,
    ),
    Row(
        "parallelism", "context parallelism", REFUSED, "a head's pages are on one rank",
        "leave its sizes at 1", REFUSALS, _has_context_parallelism,
    ),
    Row("parallelism", "expert parallelism", NOT_TRIED, "on GPUs"),
    Row(
        "parallelism", "expert parallelism on CPUs", REFUSED,
        "vLLM 0.32 has no kernel for it there, and its workers die",
        "leave out --enable-expert-parallel", REFUSALS, _has_experts_on_cpus,
    ),
    Row(
        "parallelism", "data parallelism", WORKS,
        "2 replicas in diffkv serve, each with a pool; vLLM itself refuses it within one process", "",
        (f"{TESTS}test_server.py::test_two_replicas",),
    ),
    Row(
        "parallelism", "micro-batches (--enable-dbo)", REFUSED, "a step is planned once",
        "leave out --enable-dbo", REFUSALS, lambda config: config.parallel_config.use_ubatching,
    ),
    Row("parallelism", "several machines", NOT_TRIED, "vLLM's part, by Ray or multiprocessing"),
    Row("parallelism", "CPU", WORKS, "every test above runs on one", "", FAMILIES),
    Row(
        "parallelism", "GPU", TRIED,
        "[engines and a server on one H100 and on two, engines on an H200]"
        "(results/gpu/README.md#engines), in bf16; not yet there: preemption",
    ),
)  # fmt: skip

MATRIX = (
    *MODELS,
    *(
        Row("weights", name, WORKS, "a tiny checkpoint agrees with vLLM's own cache", "", _WEIGHTS)
        for name in (
            "GPTQ int4", "AWQ int4", "FP8 (compressed-tensors)", "INT8 (compressed-tensors)",
        )
    ),
    *(
        Row(
            "weights", name, REFUSED, "vLLM itself has no CPU kernel for it",
            "run it on a GPU, or take another weight format",
            (f"{TESTS}test_weights.py::test_what_vllm_cannot_run_on_a_cpu_is_one_line",),
        )
        for name in ("quantising to FP8 while loading, on a CPU", "AWQ experts, on a CPU without AMX")
    ),
    Row(
        "weights", "int4 weights, on a CPU without AVX-512", REFUSED,
        "vLLM itself has no kernel for them there, and ends at the first request",
        "run it on a GPU or a CPU with AVX-512, or take another weight format",
        (f"{TESTS}test_weights.py::test_int4_without_avx512_is_refused", *REFUSALS),
        _has_int4_without_avx512,
    ),
    Row("weights", "float32, bfloat16", WORKS, "", "", (*FAMILIES, *_WEIGHTS)),
    *_FEATURES,
    *_PARALLELISM,
    *_VERSIONS,
)  # fmt: skip
"""The whole table. Only what a test runs is said to work."""


def refuse(vllm_config: Any) -> None:
    """Refuse the first thing that a vLLM configuration asks for and DiffKV cannot do.

    Raises:
        ConfigError: names it, and what to change.
    """
    for row in MATRIX:
        if row.asked is not None and row.asked(vllm_config):
            raise ConfigError(row.refusal(vllm_config))


def to_markdown() -> str:
    """docs/support-matrix.md."""
    lines = [
        "# What works with DiffKV",
        "",
        "<!-- Written by `python tools/support_matrix.py` from src/diffkv/vllm_plugin/matrix.py. -->",
        "",
        "*works*: the tests named beside it run it. *refused*: the engine does not start, and says "
        "in one line what to change. *turned off*: the start-up log says so. *tried*: it was run by "
        "hand; no test runs it. *not tried*: it may work.",
    ]
    for area in dict.fromkeys(row.area for row in MATRIX):
        lines += ["", f"## {area.capitalize()}", "", "| | | why, what to change | tests |"]
        lines += ["|---|---|---|---|"]
        for row in MATRIX:
            if row.area == area:
                notes = "; ".join(text for text in (row.why, row.change) if text)
                tests = ", ".join(f"`{test.rsplit('/', 1)[-1]}`" for test in row.tests)
                lines.append(f"| {row.feature} | {row.status} | {notes} | {tests} |")
    return "\n".join(lines) + "\n"
