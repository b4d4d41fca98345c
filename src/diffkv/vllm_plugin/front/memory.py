"""The KV memory that an engine of a command asks for where its user names none: what it needs.

vLLM's own choice is nine tenths of the machine, whatever the model and the prompts are. On a GPU it
stays, because that memory is there for one engine; a host has other things to do.
"""

from collections.abc import Sequence
from typing import Any

from diffkv.shape import PoolShape
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
    head_dim, element_bytes = model.get_head_size(), model.dtype.itemsize
    if lengths is None:
        lengths = [longest] * UNKNOWN_REQUESTS
    running = sorted((min(length, longest) for length in lengths), reverse=True)[:most]
    dense = 2 * num_layers * heads * head_dim * element_bytes
    if options is None:
        one, together = dense * longest, dense * sum(running)
    else:
        layout = options.layout(head_dim, element_bytes)
        one = PoolShape.least_budget(layout, num_layers, heads, longest, most, options.segment)
        requests = {
            length: PoolShape.request_bytes(
                layout, num_layers, heads, length, options.segment, high_share=1
            )
            for length in running
        }
        together = sum(requests[length] for length in running)
    return int(max(LEAST_BYTES, SPARE * one, min(SPARE * together, MOST_BYTES)))
