"""The KV memory that an engine of a command asks for where its user names none: what it needs.

vLLM's own choice is nine tenths of the machine, whatever the model and the prompts are. On a GPU it
stays, because that memory is there for one engine; a host has other things to do.
"""

from collections.abc import Sequence
from typing import Any

from diffkv.shape import HIGH_SHARE, PoolShape
from diffkv.vllm_plugin.layers import num_full_layers
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
    full_layers = 0 if options is None else num_full_layers(vllm_config)
    head_dim, element_bytes = model.get_head_size(), model.dtype.itemsize
    if lengths is None:
        lengths = [longest] * UNKNOWN_REQUESTS
    running = sorted((min(length, longest) for length in lengths), reverse=True)[:most]
    dense_layers = num_layers - full_layers  # their windows are taken to be as long as a request
    dense = 2 * dense_layers * heads * head_dim * element_bytes
    one, together = dense * longest, dense * sum(running)
    if options is not None:
        sizes = options.layout(head_dim, element_bytes), full_layers, heads
        share = 1.0 if dense_layers else HIGH_SHARE
        one += PoolShape.least_budget(*sizes, longest, most, options.segment, share)
        requests = {
            length: PoolShape.request_bytes(*sizes, length, options.segment, high_share=1)
            for length in running
        }
        together += sum(requests[length] for length in running)
    return int(max(LEAST_BYTES, SPARE * one, min(SPARE * together, MOST_BYTES)))
