"""Exact attention of prompts inside vLLM: by the kernels that the same model has without DiffKV."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from diffkv.prefill import Prefill, torch_prefill

__all__ = ["choose_prefill"]

FLASH_DTYPES = (torch.float16, torch.bfloat16)
BLOCK_TOKENS = 128
KV = 2


def choose_prefill(device_type: str, dtype: torch.dtype, head_dim: int) -> Prefill:
    """What attends to prompts on a device.

    Flash-attention has no float32, which models run in only to be compared; torch has it everywhere.
    On CPUs vLLM's own kernel takes less than half the time of torch's, where it has the head_dim.

    Args:
        device_type: "cpu" or "cuda".
        dtype: the model's.
        head_dim: of its attention.
    """
    if device_type == "cpu":
        return _cpu_prefill(dtype, head_dim)
    if device_type != "cuda" or dtype not in FLASH_DTYPES:
        return torch_prefill
    return _flash_prefill(head_dim)


def _flash_prefill(head_dim: int) -> Prefill:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    version = get_flash_attn_version(head_size=head_dim)

    def flash_prefill(
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        scale: float,
        outputs: Sequence[Tensor],
    ) -> None:
        """`Prefill` by one call for all requests."""
        num_queries, num_keys = [len(q) for q in queries], [len(k) for k in keys]
        out = flash_attn_varlen_func(
            q=_packed(queries),
            k=_packed(keys),
            v=_packed(values),
            max_seqlen_q=max(num_queries),
            cu_seqlens_q=_starts(num_queries, queries[0].device),
            max_seqlen_k=max(num_keys),
            cu_seqlens_k=_starts(num_keys, queries[0].device),
            softmax_scale=scale,
            causal=True,
            fa_version=version,
        )
        for output, rows in zip(outputs, out.split(num_queries), strict=True):
            output.copy_(rows)

    return flash_prefill


def _cpu_prefill(dtype: torch.dtype, head_dim: int) -> Prefill:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

    if head_dim not in CPUAttentionBackend.get_supported_head_sizes():
        return torch_prefill
    isa = _get_attn_isa(dtype, BLOCK_TOKENS, head_dim)

    def cpu_prefill(
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        scale: float,
        outputs: Sequence[Tensor],
    ) -> None:
        """`Prefill` by vLLM's kernel, which reads blocks: keys and values are copied into some."""
        for query, key, value, output in zip(queries, keys, values, outputs, strict=True):
            (total, num_kv_heads, _), num_heads = key.shape, query.shape[1]
            num_blocks = -(-total // BLOCK_TOKENS)
            # Zeros: the kernel may read a block's unused end before it masks it
            shape = (num_blocks, num_kv_heads, KV * BLOCK_TOKENS, head_dim)
            caches = torch.zeros(shape, dtype=dtype).chunk(KV, dim=2)
            ops.cpu_attn_reshape_and_cache(key, value, *caches, torch.arange(total), isa)
            starts = torch.tensor([0, len(query)], dtype=torch.int32)
            lengths = torch.tensor([total], dtype=torch.int32)
            metadata = ops.cpu_attn_get_scheduler_metadata(
                1, num_heads, num_kv_heads, head_dim, lengths, dtype, starts, True, -1, isa, True
            )
            table = torch.arange(num_blocks, dtype=torch.int32)[None]
            out = torch.empty(query.shape, dtype=dtype)
            ops.cpu_attention_with_kv_cache(
                query, *caches, out, starts, lengths, scale, True, None, -1, table, 0.0, metadata,
                None,
            )  # fmt: skip
            output.copy_(out)

    return cpu_prefill


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    starts = [0, *accumulate(lengths)]
    return torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
