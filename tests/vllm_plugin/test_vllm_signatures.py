"""Everything of vLLM that the plugin relies on is there, with the names that it uses.

Another version of vLLM fails here, with the name of what changed, before it fails somewhere inside.
"""

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from diffkv.quant import ConfigError

FUNCTIONS = {
    # turning it on
    "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.register_connector": (
        "name module_path class_name"
    ),
    "vllm.v1.attention.backends.registry:register_backend": "backend class_path",
    "vllm.v1.core.single_type_kv_cache_manager:register_all_kvcache_specs": "vllm_config",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": (
        "kvcache_spec_cls manager_class uniform_type_base_spec"
    ),
    "vllm.utils.import_utils:resolve_obj_by_qualname": "qualname",
    "vllm.config:get_current_vllm_config": "",
    "vllm.config:get_current_vllm_config_or_none": "",
    "vllm.distributed.kv_transfer:get_kv_transfer_group": "",
    "vllm.distributed.parallel_state:get_tensor_model_parallel_rank": "",
    "vllm.logger:init_logger": "name",
    # the scheduler's side
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": "num_blocks",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "ordered_blocks",
    "vllm.v1.core.block_pool:BlockPool.unpin_blocks": "blocks on_reuse",
    "vllm.v1.core.block_pool:BlockPool.touch": "blocks",
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks": "",
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids": "",
    "vllm.config:ModelConfig.get_num_layers": "parallel_config",
    "vllm.config:ModelConfig.get_num_kv_heads": "parallel_config",
    "vllm.config:ModelConfig.get_head_size": "",
    # on CUDA
    "vllm.v1.attention.backends.fa_utils:get_flash_attn_version": "head_size",
    "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.pre_forward": "scheduler_output",
    # the command line
    "vllm:LLM.generate": "prompts sampling_params use_tqdm",
    "vllm:LLM.collective_rpc": "method",
    "vllm:LLM.get_metrics": "",
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": "parser",
    "vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args": "args",
    "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config": "usage_context",
    "vllm.entrypoints.cli.serve:ServeSubcommand.cmd": "args",
    "vllm.entrypoints.launchers.cli_args:make_arg_parser": "parser",
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args": "args",
    "vllm.entrypoints.serve.utils.api_utils:cli_env_setup": "",
    "vllm.logger:configure_logging_from_args": "args",
    "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_args": "args",
}
"""Called by us: parameters that we pass, or count on."""

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"

ATTRIBUTES = {
    "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory": "_registry",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": "CUSTOM CPU_ATTN",
    "vllm.v1.attention.backend:AttentionType": "DECODER",
    "vllm.v1.attention.backend:AttentionCGSupport": "NEVER UNIFORM_SINGLE_TOKEN_DECODE",
    "vllm.usage.usage_lib:UsageContext": "OPENAI_API_SERVER",
    "vllm.exceptions:VLLMClientError": "",
    "vllm.v1.request:RequestStatus": (
        "RUNNING FINISHED_STOPPED FINISHED_LENGTH_CAPPED FINISHED_ABORTED FINISHED_REPETITION"
    ),
    "vllm.config:VllmConfig": (
        "model_config parallel_config cache_config scheduler_config device_config "
        "speculative_config kv_transfer_config compilation_config max_concurrent_batches "
        "use_v2_model_runner"
    ),
    "vllm.config:ModelConfig": (
        "dtype max_model_len use_mla is_encoder_decoder is_hybrid hf_text_config "
        "disable_sliding_window"
    ),
    "vllm.config:ParallelConfig": (
        "pipeline_parallel_size decode_context_parallel_size prefill_context_parallel_size "
        "use_ubatching enable_expert_parallel"
    ),
    "vllm.config:CacheConfig": (
        "cache_dtype kv_cache_memory_bytes enable_prefix_caching gpu_memory_utilization "
        "block_size num_gpu_blocks kv_cache_size_tokens"
    ),
    "vllm.config:SchedulerConfig": (
        "max_num_seqs max_num_batched_tokens enable_chunked_prefill scheduler_reserve_full_isl"
    ),
    "vllm.config:CompilationConfig": "static_forward_context",
    "vllm.config:KVTransferConfig": "kv_connector kv_role kv_connector_extra_config",
    "vllm.engine.arg_utils:EngineArgs": (
        "kv_transfer_config worker_extension_cls logits_processors enable_prefix_caching "
        "attention_backend kv_cache_memory_bytes gpu_memory_utilization use_tqdm_on_load "
        "disable_log_stats enforce_eager"
    ),
    "vllm:SamplingParams": "extra_args",
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "finished_req_ids preempted_req_ids scheduled_new_reqs scheduled_cached_reqs "
        "num_scheduled_tokens"
    ),
    "vllm.v1.core.sched.output:NewRequestData": "req_id num_computed_tokens",
    "vllm.v1.core.sched.output:CachedRequestData": "req_ids num_computed_tokens",
    "vllm.v1.outputs:KVConnectorOutput": "kv_connector_worker_meta",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups num_blocks",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.kv_cache_interface:FullAttentionSpec": (
        "block_size num_kv_heads head_size dtype num_head_slots state_content_bytes "
        "prefix_cacheable block_table_token_alignment"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder": (
        "_cudagraph_support reorder_batch_threshold"
    ),
    "vllm.v1.attention.backend:AttentionBackend": (
        "forward_includes_kv_cache_update supported_dtypes"
    ),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "block_table_tensor num_reqs query_start_loc_cpu seq_lens"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": (
        "supports_fine_grained_hash_lookup"
    ),
    f"{CONNECTOR}.base:KVConnectorBase_V1": "requires_kv_delivery role",
}
"""Read or set by us: attributes of a class, of its dataclass fields or of its instances."""

ASSIGNED = {
    "vllm.v1.core.block_pool:BlockPool": "num_gpu_blocks",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": (
        "block_pool req_to_blocks num_cached_block enable_caching block_size kv_cache_spec"
    ),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": "single_type_managers",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "coordinator",
    "vllm.config:ModelConfig": "runner_type",
    "vllm.v1.request:Request": (
        "request_id sampling_params num_tokens num_computed_tokens status resumable block_hashes "
        "all_token_ids mm_features prompt_embeds"
    ),
    f"{CONNECTOR}.base:KVConnectorBase_V1": "_vllm_config _kv_cache_config",
    f"{CONNECTOR}.metrics:KVConnectorPromMetrics": "_gauge_cls _counter_cls _histogram_cls",
}
"""Attributes that methods, of the class or of a base, assign."""

OVERRIDES = {
    "diffkv.vllm_plugin.connector:DiffKVConnector": (
        f"{CONNECTOR}.base:KVConnectorBase_V1",
        "__init__ bind_kv_cache_manager on_new_request get_num_new_matched_tokens "
        "update_state_after_alloc has_pending_block_frees build_connector_meta "
        "update_connector_output reset_cache register_kv_caches "
        "handle_preemptions build_connector_worker_meta get_kv_connector_stats start_load_kv "
        "wait_for_layer_load save_kv_layer wait_for_save build_kv_connector_stats "
        "build_prom_metrics",
    ),
    "diffkv.vllm_plugin.connector:DiffKVConnector ": (
        f"{CONNECTOR}.base:SupportsHMA",
        "request_finished_all_groups",
    ),
    "diffkv.vllm_plugin.messages:ReportMessage": (
        f"{CONNECTOR}.base:KVConnectorWorkerMetadata",
        "aggregate",
    ),
    "diffkv.vllm_plugin.metrics:DiffKVStats": (
        f"{CONNECTOR}.metrics:KVConnectorStats",
        "reset aggregate reduce is_empty",
    ),
    "diffkv.vllm_plugin.metrics:DiffKVPromMetrics": (
        f"{CONNECTOR}.metrics:KVConnectorPromMetrics",
        "__init__ observe",
    ),
    "diffkv.vllm_plugin.spec:DiffKVSpec": (
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "get_num_kernel_states max_memory_usage_bytes merge",
    ),
    "diffkv.vllm_plugin.scheduler.manager:DiffKVManager": (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        "__init__ get_num_blocks_to_allocate allocate_new_blocks pop_blocks_for_free "
        "find_longest_cache_hit add_local_computed_blocks cache_blocks",
    ),
    "diffkv.vllm_plugin.worker.backend:DiffKVBackend": (
        "vllm.v1.attention.backend:AttentionBackend",
        "get_name get_impl_cls get_builder_cls get_supported_kernel_block_sizes "
        "supports_sliding_window customize_spec",
    ),
    "diffkv.vllm_plugin.worker.backend:DiffKVBuilder": (
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
        "__init__ build build_for_cudagraph_capture get_cudagraph_support",
    ),
    "diffkv.vllm_plugin.worker.backend:DiffKVImpl": (
        "vllm.v1.attention.backend:AttentionImpl",
        "__init__ forward",
    ),
    "diffkv.vllm_plugin.front.admission:Admission": (
        "vllm.v1.sample.logits_processor:LogitsProcessor",
        "__init__ validate_params apply is_argmax_invariant update_state",
    ),
    "diffkv.vllm_plugin.front.admission:Admission ": (
        "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor",
        "validate_params apply add_request",
    ),
}
"""Our class: vLLM's base, and the methods that vLLM must go on calling."""


def find(path: str) -> Any:
    module, _, names = path.strip().partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        assert hasattr(found, name), f"{path}: vLLM has no {name} any more"
        found = getattr(found, name)
    return found


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("path", FUNCTIONS)
def test_functions_that_we_call(path: str) -> None:
    found = parameters(find(path))
    takes_any = any(p.kind is p.VAR_KEYWORD for p in found.values())
    for name in FUNCTIONS[path].split():
        assert name in found or takes_any, f"{path} has no parameter {name}: {list(found)}"


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes_that_we_read(path: str) -> None:
    cls = find(path)
    known = set(dir(cls)) | set(getattr(cls, "__annotations__", {}))
    known |= {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    # structs keep their fields elsewhere
    known |= set(getattr(cls, "__struct_fields__", ()))
    for name in ATTRIBUTES[path].split():
        assert name in known, f"{path} has no {name}"


@pytest.mark.parametrize("path", ASSIGNED)
def test_attributes_that_instances_have(path: str) -> None:
    cls = find(path)
    sources = [
        inspect.getsource(base) for base in cls.__mro__ if base.__module__.startswith("vllm.")
    ]
    declared = {name for base in cls.__mro__ for name in vars(base)}
    declared |= {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    for name in ASSIGNED[path].split():
        assigned = any(f"self.{name} =" in s or f"self.{name}:" in s for s in sources)
        assert assigned or name in declared, f"instances of {path} have no {name}"


@pytest.mark.parametrize("path", OVERRIDES)
def test_methods_that_we_override(path: str) -> None:
    """Ours take what the base's take, under the same names."""
    ours, (base_path, names) = find(path), OVERRIDES[path]
    base = find(base_path)
    assert issubclass(ours, base)
    for name in names.split():
        assert hasattr(base, name), f"{base_path} has no {name}: vLLM will not call ours"
        method = getattr(ours, name)
        accepted = parameters(method)
        any_keyword = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        for parameter in parameters(getattr(base, name)).values():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            # messages between processes: vLLM passes the one argument by position
            by_position = len(accepted) == len(parameters(getattr(base, name)))
            assert any_keyword or by_position or parameter.name in accepted, (
                f"{base_path}.{name} has a parameter {parameter.name} that ours does not take: "
                f"{list(accepted)}"
            )


def test_flash_attention() -> None:
    """Its module cannot be imported without CUDA, but read."""
    package = Path(importlib.import_module("vllm").__file__ or "").parent
    source = (package / "vllm_flash_attn" / "flash_attn_interface.py").read_text()
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    taken = {argument.arg for argument in function.args.args}
    assert taken >= {
        "q",
        "k",
        "v",
        "max_seqlen_q",
        "cu_seqlens_q",
        "max_seqlen_k",
        "cu_seqlens_k",
        "softmax_scale",
        "causal",
        "fa_version",
    }


def test_leading_parameters_are_where_we_expect_them() -> None:
    """Our manager names these, and takes the rest as they come."""
    base = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
    for name in ("get_num_blocks_to_allocate", "allocate_new_blocks"):
        assert list(parameters(find(f"{base}.{name}")))[1:3] == ["request_id", "num_tokens"]
    asked = parameters(find(f"{base}.get_num_blocks_to_allocate"))
    assert list(asked)[3:5] == ["new_computed_blocks", "total_computed_tokens"]
    assert "apply_admission_cap" in asked
    assert list(parameters(find(f"{base}.find_longest_cache_hit")))[:3] == [
        "block_hashes",
        "max_length",
        "kv_cache_group_ids",
    ]


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "0.33.0rc1", "1.32.0", "0.3.2", "0.320.1"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from diffkv.vllm_plugin import engine_args, support

    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(ConfigError, match=f"works with vLLM 0.32.x, this is vLLM {version}"):
        support.check_version()
    with pytest.raises(ConfigError, match=r"install vllm==0\.32\.0"):
        engine_args()


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.0+cpu", "0.32.1", "0.32.0rc2", "0.32.1.dev3+g1"]
)
def test_patch_releases_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from diffkv.vllm_plugin import support

    monkeypatch.setattr("vllm.__version__", version)
    support.check_version()


def test_register_only_warns_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM calls it in every process, also where nobody asked for DiffKV."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from diffkv.vllm_plugin import register

    monkeypatch.setattr("vllm.__version__", "0.99.0")
    monkeypatch.setattr(KVConnectorFactory, "_registry", {})
    register()
    assert KVConnectorFactory._registry == {}
