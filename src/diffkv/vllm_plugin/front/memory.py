"""The KV memory that an engine of a command asks for where its user names none: what it needs.

vLLM's own choice is nine tenths of the machine, whatever the model and the prompts are. On a GPU it
stays, because that memory is there for one engine; a host has other things to do.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from diffkv.shape import HIGH_SHARE, PoolShape
from diffkv.vllm_plugin.layers import is_divided, num_full_layers
from diffkv.vllm_plugin.options import Options

__all__ = ["needed_bytes"]

LEAST_BYTES, MOST_BYTES = 256 << 20, 4 << 30
"""At least so much, and not more for requests beyond the first: the others wait for their turn."""

UNKNOWN_REQUESTS = 8
"""Requests of the longest length for which there is memory where nothing is known of them."""

SPARE = 1.1
"""Blocks that are not full, and those that vLLM leaves free when it admits requests."""


def needed_bytes(
    vllm_config: Any, options: Options | None, lengths: Sequence[int] | None = None
) -> int:
    """KV memory of one rank that holds some requests at once, uncompressed.

    Args:
        vllm_config: vLLM's configuration.
        options: DiffKV's; None for vLLM's own cache.
        lengths: tokens of each request, prompt and answer; None: not known.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    longest, most = model.max_model_len, vllm_config.scheduler_config.max_num_seqs
    num_layers, heads = model.get_num_layers(parallel), model.get_num_kv_heads(parallel)
    num_full = num_full_layers(vllm_config)
    head_dim, element_bytes = model.get_head_size(), model.dtype.itemsize
    if lengths is None:
        lengths = [longest] * UNKNOWN_REQUESTS
    running = sorted((min(length, longest) for length in lengths), reverse=True)[:most]
    # windows are taken to be as long as a request
    num_windows = 0 if model.is_hybrid else num_layers - num_full
    num_dense = num_windows + (num_full if options is None else 0)
    of_token = 2 * heads * head_dim * element_bytes
    states = _state_bytes(vllm_config, of_token) * (num_layers - num_full or num_layers)
    one = num_dense * of_token * longest + states
    together = num_dense * of_token * sum(running) + states * len(running)
    if options is not None:
        sizes = options.layout(head_dim, element_bytes), num_full, heads
        share = 1.0 if is_divided(vllm_config) else HIGH_SHARE
        one += PoolShape.least_budget(*sizes, longest, most, options.segment, share)
        requests = {
            length: PoolShape.request_bytes(*sizes, length, options.segment, high_share=1)
            for length in running
        }
        together += sum(requests[length] for length in running)
    return int(max(LEAST_BYTES, SPARE * one, min(SPARE * together, MOST_BYTES)))


def _state_bytes(vllm_config: Any, of_token: int) -> int:
    """Bytes of one layer's recurrent state: as vLLM pads it, to whole blocks of a layer with attention.

    Args:
        vllm_config: vLLM's configuration.
        of_token: bytes of a token in one layer with attention.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    model = vllm_config.model_config
    if not model.is_hybrid:
        return 0
    kind, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    shapes = kind.get_mamba_state_shape_from_config(vllm_config)
    dtypes = kind.get_mamba_state_dtype_from_config(vllm_config)
    state = sum(prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
    block = of_token * vllm_config.cache_config.block_size
    return int(-(-state // block) * block)
