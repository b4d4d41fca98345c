"""Exact attention of prompts inside vLLM: on CUDA by the flash-attention that vLLM brings."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from diffkv.prefill import Prefill, torch_prefill

__all__ = ["choose_prefill"]

FLASH_DTYPES = (torch.float16, torch.bfloat16)


def choose_prefill(device_type: str, dtype: torch.dtype, head_dim: int) -> Prefill:
    """What attends to prompts on a device.

    Flash-attention has no float32, which models run in only to be compared; torch has it everywhere.

    Args:
        device_type: "cpu" or "cuda".
        dtype: the model's.
        head_dim: of its attention.
    """
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


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    starts = [0, *accumulate(lengths)]
    return torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
