"""Exact attention of prompts inside vLLM: by the kernels that the same model has without DiffKV."""

import torch
from torch import Tensor
from vllm.logger import init_logger

from diffkv.prefill import Prefill, Spans, torch_prefill

__all__ = ["choose_prefill", "may_use"]

logger = init_logger("vllm.diffkv")

FLASH_DTYPES = (torch.float16, torch.bfloat16)
BLOCK_TOKENS = 128
KV = 2


def choose_prefill(device_type: str, dtype: torch.dtype, head_dim: int) -> Prefill:
    """The function that attends to prompts on a device.

    Flash-attention has no float32, which models run in only to be compared; torch has it everywhere.
    On CPUs vLLM's own kernel takes less than half the time of torch's, where it has the head_dim.

    Args:
        device_type: "cpu" or "cuda".
        dtype: the model's.
        head_dim: the model's.
    """
    if device_type == "cpu":
        return _cpu_prefill(dtype, head_dim)
    if device_type != "cuda" or dtype not in FLASH_DTYPES:
        return torch_prefill
    return _flash_prefill(head_dim)


def may_use(isa: str) -> bool:
    """Whether the system lets this process use the instructions that vLLM's CPU attention chose.

    Until a process has asked for AMX its instructions are illegal, and only some matrix products ask.
    """
    return isa != "amx" or bool(torch.cpu._init_amx())


def _flash_prefill(head_dim: int) -> Prefill:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    version = get_flash_attn_version(head_size=head_dim)

    def flash_prefill(
        query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, output: Tensor
    ) -> Tensor:
        """`Prefill` by one call for all requests, which writes the output in its place."""
        _, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            max_seqlen_q=max(spans.num_queries),
            cu_seqlens_q=spans.query_starts,
            max_seqlen_k=max(spans.num_keys),
            cu_seqlens_k=spans.key_starts,
            softmax_scale=scale,
            causal=True,
            return_softmax_lse=True,
            out=output,
            fa_version=version,
        )
        found: Tensor = lse
        return found

    return flash_prefill


def _cpu_prefill(dtype: torch.dtype, head_dim: int) -> Prefill:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

    if head_dim not in CPUAttentionBackend.get_supported_head_sizes():
        return torch_prefill
    isa = _get_attn_isa(dtype, BLOCK_TOKENS, head_dim)
    if not may_use(isa):
        logger.warning(
            "DiffKV: the system refuses AMX, so torch attends to prompts, which is slower"
        )
        return torch_prefill

    def cpu_prefill(
        query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, output: Tensor
    ) -> None:
        """`Prefill` by vLLM's kernel, which reads blocks: keys and values are copied into some."""
        queries, outputs = query.split(spans.num_queries), output.split(spans.num_queries)
        keys, values = key.split(spans.num_keys), value.split(spans.num_keys)
        for q, k, v, out in zip(queries, keys, values, outputs, strict=True):
            (total, num_kv_heads, _), num_heads = k.shape, q.shape[1]
            num_blocks = -(-total // BLOCK_TOKENS)
            shape = (num_blocks, num_kv_heads, KV * BLOCK_TOKENS, head_dim)
            blocks = torch.empty(shape, dtype=dtype)
            blocks[-1] = 0  # the kernel may read a block's unused end before it masks it
            caches = blocks.chunk(KV, dim=2)
            ops.cpu_attn_reshape_and_cache(k, v, *caches, torch.arange(total), isa)
            starts = torch.tensor([0, len(q)], dtype=torch.int32)
            lengths = torch.tensor([total], dtype=torch.int32)
            metadata = ops.cpu_attn_get_scheduler_metadata(
                1, num_heads, num_kv_heads, head_dim, lengths, dtype, starts, True, -1, isa, True
            )
            table = torch.arange(num_blocks, dtype=torch.int32)[None]
            attended = torch.empty(q.shape, dtype=dtype)
            ops.cpu_attention_with_kv_cache(
                q,
                *caches,
                attended,
                starts,
                lengths,
                scale,
                True,
                None,
                -1,
                table,
                0.0,
                metadata,
                None,
            )
            out.copy_(attended)

    return cpu_prefill
