"""What DiffKV relies on in vLLM, name by name, by the sections of docs/vllm.md: the one list.

`vllm_surface` writes down what a vLLM has under these names. For every version that is supported,
tests/vllm_plugin/test_vllm_signatures.py compares that with this list and with our code.
The file is a table, and so longer than others.
"""

from dataclasses import dataclass, field

__all__ = ["HOOKS", "MOVED", "Hook", "all_names", "called_name", "inside_names", "moved", "table"]

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"
MANAGERS = "vllm.v1.core.single_type_kv_cache_manager"
BACKEND = "vllm.v1.attention.backend"
PROCESSOR = "vllm.v1.sample.logits_processor"
PROCESSOR_V2 = "vllm.v1.worker.gpu.sample.logits_processor.interface"
BACKENDS = "vllm.v1.attention.backends"
LOCAL_IMPLS = (
    "cpu_attn:CPUAttentionBackendImpl",
    "flash_attn:FlashAttentionImpl",
    "triton_attn:TritonAttentionImpl",
)
"""Implementations of layers with windows or chunks that we have store keys and values themselves."""
TURBOQUANT = "vllm.model_executor.layers.quantization.turboquant"


@dataclass(frozen=True)
class Hook:
    """A section of docs/vllm.md, and what it takes of vLLM. Names are `module:name`.

    Attributes:
        section: its heading.
        calls: functions that we call, each with what we pass: by position, and after `*` by name;
            of methods, without the object.
        reads: attributes that we read or set, by class; none: the class or function itself.
        overrides: methods of ours that vLLM calls, by our class and vLLM's.
        values: what the definition of a name must say.
        bodies: functions whose inside we count on: order of calls, keys, what is asked first.
    """

    section: str
    calls: tuple[str, ...] = ()
    reads: dict[str, str] = field(default_factory=dict)
    overrides: dict[tuple[str, str], str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    bodies: tuple[str, ...] = ()


HOOKS = (
    Hook(
        "Entry point",
        bodies=("vllm.plugins:load_general_plugins",),
    ),
    Hook(
        "Attention backend",
        calls=(
            f"{BACKENDS}.registry:register_backend(backend, class_path)",
            "vllm.config:get_current_vllm_config()",
            "vllm.config:get_current_vllm_config_or_none()",
            "vllm.config:get_layers_from_vllm_config(vllm_config, layer_type)",
            *(
                f"{BACKENDS}.{name}.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)"
                for name in LOCAL_IMPLS
            ),
            "vllm.v1.attention.selector:get_attn_backend(head_size, dtype, kv_cache_dtype, *, "
            "has_sliding_window)",
            "vllm.utils.import_utils:resolve_obj_by_qualname(qualname)",
            "vllm.model_executor.layers.attention.chunked_local_attention"
            ":create_chunked_local_attention_backend(underlying_attn_backend, attention_chunk_size)",
        ),
        reads={
            f"{BACKENDS}.registry:AttentionBackendEnum": "CUSTOM CPU_ATTN get_class",
            f"{BACKEND}:AttentionType": "DECODER",
            f"{BACKEND}:AttentionCGSupport": "NEVER UNIFORM_SINGLE_TOKEN_DECODE",
            f"{BACKEND}:MultipleOf": "base",
            f"{BACKEND}:AttentionBackend": (
                "forward_includes_kv_cache_update supported_dtypes supports_kv_cache_dtype "
                "get_preferred_block_size"
            ),
            f"{BACKEND}:AttentionMetadataBuilder": "_cudagraph_support reorder_batch_threshold",
            f"{BACKEND}:CommonAttentionMetadata": (
                "block_table_tensor num_reqs query_start_loc_cpu seq_lens"
            ),
            f"{BACKENDS}.cpu_attn:CPUAttentionMetadata": "slot_mapping",
            f"{BACKENDS}.flash_attn:FlashAttentionMetadata": "slot_mapping",
            f"{BACKENDS}.triton_attn:TritonAttentionMetadata": "slot_mapping",
            **dict.fromkeys(
                (f"{BACKENDS}.{name}" for name in LOCAL_IMPLS), "kv_sharing_target_layer_name"
            ),
            "vllm.config:AttentionConfig": "backend backend_per_kind",
            "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": "",
            "vllm.config:CompilationConfig": "static_forward_context",
            "vllm.platforms:current_platform": "",
        },
        overrides={
            ("diffkv.vllm_plugin.worker.backend:DiffKVBackend", f"{BACKEND}:AttentionBackend"): (
                "get_name get_impl_cls get_builder_cls get_supported_kernel_block_sizes "
                "supports_sliding_window validate_configuration customize_spec"
            ),
            ("diffkv.vllm_plugin.worker.windows:MixedBackend", f"{BACKEND}:AttentionBackend"): (
                "get_builder_cls get_supported_kernel_block_sizes customize_spec"
            ),
            ("diffkv.vllm_plugin.worker.windows:CudaBackend", f"{BACKEND}:AttentionBackend"): (
                "get_impl_cls supported_kv_cache_layouts"
            ),
            (
                "diffkv.vllm_plugin.worker.backend:DiffKVBuilder",
                f"{BACKEND}:AttentionMetadataBuilder",
            ): "__init__ build get_cudagraph_support",
            ("diffkv.vllm_plugin.worker.backend:DiffKVImpl", f"{BACKEND}:AttentionImpl"): (
                "__init__ forward"
            ),
            (
                "diffkv.vllm_plugin.worker.cpu:CpuBackend",
                f"{BACKENDS}.cpu_attn:CPUAttentionBackend",
            ): (
                "get_impl_cls get_builder_cls get_supported_kernel_block_sizes "
                "supported_kv_cache_layouts customize_spec"
            ),
            **{
                ("diffkv.vllm_plugin.worker.windows:_Stores", f"{BACKENDS}.{name}"): "forward"
                for name in LOCAL_IMPLS
            },
        },
        values={
            "vllm.v1.kv_cache_interface:KVCacheSpecKind.FULL_ATTENTION": (
                "FULL_ATTENTION = 'full_attention'"
            ),
            f"{BACKENDS}.registry:AttentionBackendEnum.CPU_ATTN": (
                "CPU_ATTN = 'vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend'"
            ),
        },
        bodies=(
            "vllm.v1.attention.selector:get_attn_backend",
            "vllm.v1.attention.selector:_cached_get_attn_backend",
            "vllm.v1.attention.selector:get_attn_spec_kind",
            "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
            "vllm.platforms.cuda:CudaPlatformBase.get_attn_backend_cls",
        ),
    ),
    Hook(
        "KV-cache spec",
        reads={
            "vllm.v1.kv_cache_interface:AttentionSpec": "",
            "vllm.v1.kv_cache_interface:FullAttentionSpec": (
                "block_size num_kv_heads head_size dtype num_head_slots state_content_bytes "
                "kv_quant_mode non_causal"
            ),
            "vllm.v1.kv_cache_interface:KVQuantMode": "NONE",
        },
        overrides={
            (
                "diffkv.vllm_plugin.spec:DiffKVSpec",
                "vllm.v1.kv_cache_interface:FullAttentionSpec",
            ): (
                "prefix_cacheable block_table_token_alignment get_num_kernel_states "
                "max_num_blocks_per_req max_memory_usage_bytes merge"
            ),
        },
        values={
            "vllm.v1.kv_cache_interface:FullAttentionSpec.kv_quant_mode": (
                "kv_quant_mode: KVQuantMode = KVQuantMode.NONE"
            ),
            "vllm.v1.kv_cache_interface:KVQuantMode.NONE": "NONE = 0",
        },
        bodies=(
            "vllm.v1.worker.utils:customize_attention_spec",
            "vllm.v1.kv_cache_interface:FullAttentionSpec.merge",
        ),
    ),
    Hook(
        "Registry and manager",
        calls=(
            f"{MANAGERS}:register_all_kvcache_specs(vllm_config)",
            "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register"
            "(kvcache_spec_cls, manager_class, *, uniform_type_base_spec)",
            f"{MANAGERS}:FullAttentionManager.free(request_id)",
            "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys"
            "(request, start_token_idx, end_token_idx, start_mm_idx)",
        ),
        reads={
            f"{MANAGERS}:FullAttentionManager": (
                "supports_fine_grained_hash_lookup block_pool req_to_blocks num_cached_block"
            ),
            "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": "single_type_managers",
            "vllm.v1.core.kv_cache_manager:KVCacheManager": "coordinator",
            "vllm.v1.request:RequestStatus": "RUNNING",
            "vllm.v1.request:Request": (
                "request_id sampling_params num_tokens num_computed_tokens status resumable "
                "block_hashes all_token_ids"
            ),
        },
        overrides={
            (
                "diffkv.vllm_plugin.scheduler.manager:DiffKVManager",
                f"{MANAGERS}:FullAttentionManager",
            ): (
                "__init__ get_num_blocks_to_allocate allocate_new_blocks pop_blocks_for_free "
                "find_longest_cache_hit add_local_computed_blocks cache_blocks "
                "remove_skipped_blocks"
            ),
        },
        bodies=(
            "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
            f"{MANAGERS}:register_all_kvcache_specs",
            f"{MANAGERS}:FullAttentionManager.pop_blocks_for_free",
            f"{MANAGERS}:FullAttentionManager.free",
            "vllm.v1.core.kv_cache_utils:get_request_block_hasher",
            "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
            "vllm.v1.core.sched.scheduler:Scheduler.schedule",
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        ),
    ),
    Hook(
        "Blocks for the tables",
        calls=(
            "vllm.v1.core.block_pool:BlockPool.get_new_blocks(num_blocks)",
            "vllm.v1.core.block_pool:BlockPool.free_blocks(ordered_blocks)",
            "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks()",
            "vllm.v1.core.block_pool:BlockPool.unpin_blocks(blocks, on_reuse)",
            "vllm.v1.core.block_pool:BlockPool.touch(blocks)",
        ),
        reads={"vllm.v1.core.block_pool:BlockPool": "num_gpu_blocks"},
        bodies=("vllm.v1.core.block_pool:BlockPool.get_usage",),
    ),
    Hook(
        "One buffer",
        reads={
            "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups num_blocks",
            "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
        },
        bodies=("vllm.v1.worker.utils:allocate_kv_cache",),
    ),
    Hook(
        "Layers of several kinds",
        calls=(
            "vllm.v1.core.block_pool:BlockPool.__init__"
            "(num_gpu_blocks, enable_caching, hash_block_size)",
            "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.free(request_id)",
            "vllm.model_executor.models.registry:_ModelRegistry.resolve_model_cls"
            "(architectures, *, model_config)",
            "vllm.model_executor.models.interfaces:IsHybrid.get_mamba_state_shape_from_config"
            "(vllm_config)",
            "vllm.model_executor.models.granitemoehybrid:GraniteMoeHybridForCausalLM"
            ".get_mamba_state_dtype_from_config(vllm_config)",
        ),
        reads={
            "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_tensors",
            "vllm.v1.kv_cache_interface:KVCacheTensor": "size layer_stride block_stride offset",
            "vllm.v1.kv_cache_interface:KVCacheLayout": "",
            "vllm.v1.kv_cache_interface:SlidingWindowSpec": (
                "sliding_window block_size max_memory_usage_bytes page_size_bytes"
            ),
            "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec": "attention_chunk_size",
            "vllm.model_executor.models.registry:ModelRegistry": "",
            "vllm.v1.kv_cache_interface:MambaSpec": (
                "mamba_cache_mode max_memory_usage_bytes page_size_bytes"
            ),
            "vllm.v1.core.block_pool:BlockPool": "hash_block_size",
            "vllm.v1.core.kv_cache_utils:KVCacheBlock": "pool",
            "vllm.config:VllmConfig": "max_in_flight_tokens",
            "vllm.config:SchedulerConfig": "watermark disable_hybrid_kv_cache_manager",
            "vllm.config:CacheConfig": "kv_cache_max_concurrency",
        },
        overrides={
            (
                "diffkv.vllm_plugin.scheduler.divided:DividedManager",
                f"{MANAGERS}:FullAttentionManager",
            ): "get_num_blocks_to_allocate",
            (
                "diffkv.vllm_plugin.spec:DividedSpec",
                "vllm.v1.kv_cache_interface:FullAttentionSpec",
            ): "max_memory_usage_bytes",
        },
        bodies=(
            "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.get_num_blocks_to_allocate",
            "vllm.v1.core.block_pool:BlockPool.free_blocks",
            "vllm.v1.worker.gpu_worker:Worker.initialize_from_config",
            "vllm.v1.core.sched.scheduler:Scheduler.__init__",
        ),
    ),
    Hook(
        "Connector",
        calls=(
            "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory"
            ".register_connector(name, module_path, class_name)",
            "vllm.distributed.parallel_state:get_tensor_model_parallel_rank()",
            "vllm.v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids()",
        ),
        reads={
            "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory": "_registry",
            f"{CONNECTOR}.base:KVConnectorBase_V1": (
                "requires_kv_delivery role _vllm_config _kv_cache_config"
            ),
            f"{CONNECTOR}.base:KVConnectorMetadata": "",
            f"{CONNECTOR}.base:KVConnectorRole": "SCHEDULER",
            "vllm.v1.core.sched.output:SchedulerOutput": (
                "finished_req_ids preempted_req_ids scheduled_new_reqs scheduled_cached_reqs "
                "num_scheduled_tokens"
            ),
            "vllm.v1.core.sched.output:NewRequestData": "req_id num_computed_tokens",
            "vllm.v1.core.sched.output:CachedRequestData": "req_ids num_computed_tokens",
            "vllm.v1.outputs:KVConnectorOutput": "kv_connector_worker_meta",
        },
        overrides={
            (
                "diffkv.vllm_plugin.connector:DiffKVConnector",
                f"{CONNECTOR}.base:KVConnectorBase_V1",
            ): (
                "__init__ bind_kv_cache_manager on_new_request get_num_new_matched_tokens "
                "update_state_after_alloc build_connector_meta update_connector_output "
                "get_block_ids_with_load_errors has_pending_block_frees reset_cache "
                "register_kv_caches handle_preemptions build_connector_worker_meta "
                "get_kv_connector_stats start_load_kv wait_for_layer_load save_kv_layer "
                "wait_for_save build_kv_connector_stats build_prom_metrics"
            ),
            ("diffkv.vllm_plugin.connector:DiffKVConnector", f"{CONNECTOR}.base:SupportsHMA"): (
                "request_finished_all_groups"
            ),
            (
                "diffkv.vllm_plugin.messages:ReportMessage",
                f"{CONNECTOR}.base:KVConnectorWorkerMetadata",
            ): "aggregate",
        },
        bodies=("vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model",),
    ),
    Hook(
        "Settings of a request",
        reads={
            "vllm:SamplingParams": "extra_args",
            "vllm.entrypoints.openai.completion.protocol:CompletionRequest": "vllm_xargs",
            "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": "vllm_xargs",
        },
    ),
    Hook(
        "Admission check",
        calls=(
            "vllm.entrypoints.serve.utils.api_utils:validate_json_request(raw_request)",
            f"{PROCESSOR}.builtin:process_dict_updates(req_entries, batch_update, new_state)",
        ),
        reads={f"{PROCESSOR}:BatchUpdate": ""},
        overrides={
            ("diffkv.vllm_plugin.front.admission:Admission", f"{PROCESSOR}:LogitsProcessor"): (
                "__init__ validate_params apply is_argmax_invariant update_state"
            ),
            ("diffkv.vllm_plugin.front.admission:Admission", f"{PROCESSOR_V2}:LogitsProcessor"): (
                "validate_params apply add_request"
            ),
            ("diffkv.vllm_plugin.worker.forced:Forced", f"{PROCESSOR}:LogitsProcessor"): (
                "__init__ apply is_argmax_invariant update_state"
            ),
            ("diffkv.vllm_plugin.worker.forced:Forced", f"{PROCESSOR_V2}:LogitsProcessor"): (
                "__init__ apply add_request"
            ),
        },
        bodies=(
            f"{PROCESSOR}:validate_logits_processors_parameters",
            "vllm.entrypoints.serve.utils.api_utils:validate_json_request",
            "vllm.entrypoints.launchers.launcher:serve_http",
        ),
    ),
    Hook(
        "Worker extension",
        calls=(
            "vllm.distributed.kv_transfer:get_kv_transfer_group()",
            "vllm:LLM.collective_rpc(method, *, args)",
        ),
        bodies=("vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker",),
    ),
    Hook(
        "Metrics",
        reads={
            f"{CONNECTOR}.metrics:KVConnectorPromMetrics": (
                "_gauge_cls _counter_cls _histogram_cls"
            ),
            "vllm.config:CacheConfig": (
                "block_size num_gpu_blocks kv_cache_size_tokens DEFAULT_BLOCK_SIZE"
            ),
        },
        overrides={
            ("diffkv.vllm_plugin.metrics:DiffKVStats", f"{CONNECTOR}.metrics:KVConnectorStats"): (
                "reset aggregate reduce is_empty"
            ),
            (
                "diffkv.vllm_plugin.metrics:DiffKVPromMetrics",
                f"{CONNECTOR}.metrics:KVConnectorPromMetrics",
            ): "__init__ observe",
        },
    ),
    Hook(
        "Start-up checks",
        calls=(
            "vllm.config:ModelConfig.get_num_layers(parallel_config)",
            "vllm.config:ModelConfig.get_num_kv_heads(parallel_config)",
            "vllm.config:ModelConfig.get_head_size()",
            "vllm.config:ModelConfig.get_vocab_size()",
            "vllm.config:ModelConfig.try_get_generation_config()",
            "vllm.logger:init_logger(name)",
        ),
        reads={
            "vllm:__version__": "",
            "vllm.config:VllmConfig": (
                "model_config parallel_config cache_config scheduler_config device_config "
                "speculative_config kv_transfer_config compilation_config"
            ),
            "vllm.config:ModelConfig": (
                "dtype max_model_len use_mla is_encoder_decoder is_hybrid is_attention_free "
                "is_mm_prefix_lm enable_sleep_mode hf_text_config disable_sliding_window "
                "runner_type"
            ),
            "vllm.config:ParallelConfig": (
                "pipeline_parallel_size decode_context_parallel_size "
                "prefill_context_parallel_size use_ubatching enable_expert_parallel"
            ),
            "vllm.config:CacheConfig": (
                "cache_dtype kv_cache_memory_bytes enable_prefix_caching gpu_memory_utilization"
            ),
            "vllm.config:SchedulerConfig": (
                "max_num_seqs max_num_batched_tokens long_prefill_token_threshold policy "
                "scheduler_reserve_full_isl"
            ),
            "vllm.config:DeviceConfig": "device_type",
            "vllm.config:KVTransferConfig": "kv_connector kv_role kv_connector_extra_config",
        },
    ),
    Hook(
        "Attention over prompts",
        calls=(
            "vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func(*, q, k, v, "
            "max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k, softmax_scale, causal, "
            "return_softmax_lse, out, fa_version)",
            f"{BACKENDS}.fa_utils:get_flash_attn_version(*, head_size)",
            f"{BACKENDS}.cpu_attn:_get_attn_isa(dtype, block_size, head_size)",
            f"{BACKENDS}.cpu_attn:CPUAttentionBackend.get_supported_head_sizes()",
            "vllm._custom_ops:cpu_attn_reshape_and_cache"
            "(key, value, key_cache, value_cache, slot_mapping, isa)",
            "vllm._custom_ops:cpu_attn_get_scheduler_metadata(num_reqs, num_heads, num_kv_heads, "
            "head_dim, seq_lens, dtype, query_start_loc, causal, sliding_window_size, isa, "
            "enable_kv_split)",
            "vllm._custom_ops:cpu_attention_with_kv_cache(query, key_cache, value_cache, output, "
            "query_start_loc, seq_lens, scale, causal, alibi_slopes, sliding_window, block_table, "
            "softcap, scheduler_metadata, s_aux)",
        ),
        reads={f"{BACKENDS}.fa_utils:flash_attn_varlen_func": ""},
    ),
    Hook(
        "Commands",
        calls=(
            "vllm:LLM.generate(prompts, sampling_params, *, use_tqdm)",
            "vllm:LLM.get_metrics()",
            "vllm:LLM.get_tokenizer()",
            "vllm.engine.arg_utils:EngineArgs.add_cli_args(parser)",
            "vllm.engine.arg_utils:EngineArgs.create_engine_config(usage_context)",
            "vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args(args)",
            "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config(usage_context)",
            "vllm.entrypoints.cli.serve:ServeSubcommand.cmd(args)",
            "vllm.entrypoints.common.cli_args:make_arg_parser(parser)",
            "vllm.entrypoints.common.cli_args:validate_parsed_serve_args(args)",
            "vllm.entrypoints.common.startup:cli_env_setup()",
            "vllm.logger:configure_logging_from_args(args)",
            "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_args(args)",
        ),
        reads={
            "vllm:LLM": "",
            "vllm.usage.usage_lib:UsageContext": "OPENAI_API_SERVER LLM_CLASS",
            "vllm.exceptions:VLLMClientError": "",
            "vllm.engine.arg_utils:EngineArgs": (
                "kv_transfer_config worker_extension_cls logits_processors enable_prefix_caching "
                "watermark attention_config kv_cache_memory_bytes gpu_memory_utilization "
                "use_tqdm_on_load disable_log_stats enforce_eager async_scheduling kv_cache_dtype"
            ),
            "vllm.config.cache:CacheDType": "",
            f"{BACKENDS}.cpu_attn:CPUAttentionBackend": "supported_kv_cache_dtypes",
        },
    ),
    Hook(
        "On CUDA",
        calls=(
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state"
            "(scheduler_output, dummy_run)",
        ),
        reads={"vllm.config:VllmConfig": "max_concurrent_batches use_v2_model_runner"},
        bodies=(
            "vllm.config:VllmConfig.max_concurrent_batches",
            "vllm.config:VllmConfig.use_v2_model_runner",
            f"{BACKEND}:AttentionMetadataBuilder.build_for_cudagraph_capture",
            "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.pre_forward",
            "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.post_forward",
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state",
            "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture",
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner._dummy_run",
            "vllm.v1.worker.gpu.warmup:_warmup_kernels",
            "vllm.v1.worker.gpu.cudagraph_utils:profile_cudagraph_memory",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run",
        ),
    ),
    Hook(
        "Benchmarks",
        calls=(
            "vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func(q, k, v, "
            "max_seqlen_q, cu_seqlens_q, max_seqlen_k, *, seqused_k, softmax_scale, causal, "
            "block_table, out, scheduler_metadata, q_descale, k_descale, v_descale, fa_version)",
            f"{BACKENDS}.fa_utils:get_scheduler_metadata(batch_size, max_seqlen_q, max_seqlen_k, "
            "num_heads_q, num_heads_kv, headdim, cache_seqlens, *, qkv_dtype, cu_seqlens_q, "
            "page_size, causal)",
            f"{BACKENDS}.cpu_attn:_get_attn_isa(dtype, block_size, head_size, kv_cache_dtype)",
            f"{BACKENDS}.turboquant_attn:_build_hadamard(d, device_str)",
            f"{TURBOQUANT}.config:TurboQuantConfig.from_cache_dtype(cache_dtype, head_dim)",
            f"{TURBOQUANT}.centroids:get_centroids(d, bits)",
            "vllm.v1.attention.ops.triton_turboquant_store:triton_turboquant_store(key, value, "
            "kv_cache, slot_mapping, PiT, midpoints, mse_bits, key_packed_size, "
            "value_quant_bits, *, key_fp8)",
            "vllm.v1.attention.ops.triton_turboquant_decode:triton_turboquant_decode_attention("
            "query, kv_cache, block_table, seq_lens, Pi, centroids, scale, mse_bits, "
            "key_packed_size, value_quant_bits, *, key_fp8, norm_correction, PiT, mid_o_buf, "
            "output_buf, lse_buf, max_num_kv_splits)",
        ),
        reads={"vllm.sampling_params:RequestOutputKind": "DELTA FINAL_ONLY"},
    ),
)

MOVED = {
    "0.32": {
        "vllm.entrypoints.common.cli_args:make_arg_parser": (
            "vllm.entrypoints.launchers.cli_args:make_arg_parser"
        ),
        "vllm.entrypoints.common.cli_args:validate_parsed_serve_args": (
            "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args"
        ),
        "vllm.entrypoints.common.startup:cli_env_setup": (
            "vllm.entrypoints.serve.utils.api_utils:cli_env_setup"
        ),
    },
}
"""Where an older version has a name that the list has at its newest place."""


def moved(minor_version: str) -> dict[str, str]:
    """Names of the list that a version has elsewhere, and where."""
    return MOVED.get(minor_version, {})


def called_name(call: str) -> str:
    """The name of a function in `Hook.calls`."""
    return call.partition("(")[0]


def inside_names() -> set[str]:
    """Functions whose inside we count on, and classes that ours are made of."""
    bases = {base for hook in HOOKS for _, base in hook.overrides}
    return bases | {name for hook in HOOKS for name in hook.bodies}


def all_names() -> list[str]:
    """The whole list, each name once."""
    names = [name for hook in HOOKS for name in _names(hook)]
    return list(dict.fromkeys(names))


def _names(hook: Hook) -> list[str]:
    members = [*hook.reads.items(), *((base, names) for (_, base), names in hook.overrides.items())]
    return [
        *map(called_name, hook.calls),
        *(owner for owner, _ in members),
        *(f"{owner}.{name}" for owner, names in members for name in names.split()),
        *hook.values,
        *hook.bodies,
    ]


def table() -> str:
    """The list by modules, as docs/vllm.md has it."""
    lines = ["| section | vLLM's modules |", "|---|---|"]
    for hook in HOOKS:
        modules = dict.fromkeys(name.partition(":")[0] for name in _names(hook))
        names = (module.removeprefix("vllm.").replace(".", "/") for module in modules)
        lines.append(f"| {hook.section} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
