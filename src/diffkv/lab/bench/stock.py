"""The attention that DiffKV is compared with: vLLM's own kernels, torch's where there are none.

vLLM is imported only when one of its kernels is asked for: its import changes threads and logging.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffkv.lab.bench.fill import Tokens
from diffkv.lab.timing import Case

__all__ = ["Checked", "dense_attention", "stock_cases"]

CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS = 128, 16
"""vLLM's defaults."""

TURBOQUANT_SPLITS = 32
"""vLLM's default (`tq_max_kv_splits_for_cuda_graph`)."""

FP8 = "fp8"
KV = 2


@dataclass(frozen=True)
class Checked:
    """A kernel to time, and how far its output may be from what it approximates.

    Attributes:
        case: a call of it, which writes `output`.
        output: [R, num_q_heads, head_dim].
        limit: largest relative error.
    """

    case: Case
    output: Tensor
    limit: float


Made = tuple[Callable[[], object], Tensor, int, str]
"""A call, the output that it writes, useful bytes, and the kernel's name."""


def dense_attention(query: Tensor, tokens: Tokens, scale: float) -> Tensor:
    """Decode attention in float32 over the uncompressed tokens: what every kernel approximates.

    Args:
        query: [R, num_q_heads, head_dim].
        tokens: keys and values of R requests.
        scale: softmax scale.

    Returns:
        [R, num_q_heads, head_dim] float32.
    """
    key, value = (x.float().transpose(0, 1)[None] for x in (tokens.key, tokens.value))
    rows = [
        scaled_dot_product_attention(
            q.float()[None, :, None], key[:, :, :n], value[:, :, :n], scale=scale, enable_gqa=True
        )[0, :, 0]
        for q, n in zip(query, tokens.lengths, strict=True)
    ]
    return torch.stack(rows)


def stock_cases(
    query: Tensor, tokens: Tokens, scale: float, device: str
) -> tuple[list[Checked], list[str]]:
    """The kernels that a device has, and a line for each that cannot run here.

    Cases are named `stock bf16`, `stock fp8` and, on CUDA, `stock turboquant_...`.
    """
    found, missing = [], []
    for code, limit, make in _makers(device):
        try:
            run, output, num_bytes, kernel = make(query, tokens, scale)
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            missing.append(f"stock {code}: not here ({str(error).splitlines()[0]})")
            continue
        facts = {"engine": f"stock {code}", "quant": code, "kernel": kernel}
        found.append(Checked(Case(f"stock {code}", run, num_bytes, facts), output, limit))
    return found, missing


def _makers(device: str) -> Iterator[tuple[str, float, Callable[..., Made]]]:
    """Code, largest relative error, and maker of each kernel."""
    if device == "cpu":
        yield "bf16", 0.02, partial(_vllm_cpu, kv_dtype="auto")
        yield FP8, 0.15, partial(_vllm_cpu, kv_dtype=FP8)
        return
    yield "bf16", 0.02, _flash_or_torch
    yield FP8, 0.1, partial(_flash, kv_dtype=torch.float8_e4m3fn)
    for name in ("turboquant_k8v4", "turboquant_4bit_nc"):
        yield name, 0.3, partial(_turboquant, name=name)


def _blocks(
    lengths: Sequence[int], block_tokens: int, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """A block table [R, most blocks] int32 of blocks in random order, and each token's slot."""
    blocks = [-(-n // block_tokens) for n in lengths]
    order = torch.randperm(sum(blocks), device=device)
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=device)
    slots = []
    for row, (ids, length) in enumerate(zip(order.split(blocks), lengths, strict=True)):
        table[row, : len(ids)] = ids
        index = torch.arange(length, device=device)
        slots.append(ids[index // block_tokens] * block_tokens + index % block_tokens)
    return table, slots


def _vllm_cpu(query: Tensor, tokens: Tokens, scale: float, kv_dtype: str) -> Made:
    """vLLM's CPU kernel over blocks in random order, called as its CPU backend does."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from diffkv.vllm_plugin.worker.prefill import may_use

    current_platform.import_kernels()  # registers operations: those that this processor can run
    dtype, (_, heads, head_dim) = query.dtype, tokens.key.shape
    isa = _get_attn_isa(dtype, CPU_BLOCK_TOKENS, head_dim, kv_dtype)
    if not may_use(isa):
        raise RuntimeError("the system does not let this process use AMX")
    table, slots = _blocks(tokens.lengths, CPU_BLOCK_TOKENS, query.device)
    num_blocks = sum(-(-n // CPU_BLOCK_TOKENS) for n in tokens.lengths)
    stored = torch.uint8 if kv_dtype == FP8 else dtype
    shape = (num_blocks, heads, KV * CPU_BLOCK_TOKENS, head_dim)
    caches = torch.zeros(shape, dtype=stored).chunk(KV, dim=2)
    for at in slots:
        key, value = tokens.key[: len(at)], tokens.value[: len(at)]
        ops.cpu_attn_reshape_and_cache(key, value, *caches, at, isa, kv_cache_dtype=kv_dtype)
    starts = torch.arange(len(slots) + 1, dtype=torch.int32)
    lengths = torch.tensor(tokens.lengths, dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        len(slots), query.shape[1], heads, head_dim, lengths, dtype, starts, True, -1, isa, True,
        kv_cache_dtype=kv_dtype,
    )  # fmt: skip
    output = torch.empty_like(query)

    def run() -> None:
        ops.cpu_attention_with_kv_cache(
            query, *caches, output, starts, lengths, scale, True, None, -1, table, 0.0, metadata,
            None, kv_cache_dtype=kv_dtype,
        )  # fmt: skip

    num_bytes = KV * sum(tokens.lengths) * heads * head_dim * stored.itemsize
    return run, output, num_bytes, f"vLLM {isa}"


def _flash_or_torch(query: Tensor, tokens: Tokens, scale: float) -> Made:
    try:
        return _flash(query, tokens, scale, query.dtype)
    except ImportError:
        return _torch_flash(query, tokens, scale)


def _flash(query: Tensor, tokens: Tokens, scale: float, kv_dtype: torch.dtype) -> Made:
    """vLLM's flash-attention as its backend calls it; a schedule is made once, as once for a step."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
        get_scheduler_metadata,
    )

    (batch, num_q_heads, head_dim), heads = query.shape, tokens.key.shape[1]
    version, is_fp8 = get_flash_attn_version(head_size=head_dim), kv_dtype.itemsize == 1
    if is_fp8 and version != 3:
        raise NotImplementedError(f"flash-attention {version} has no fp8")
    table, slots = _blocks(tokens.lengths, GPU_BLOCK_TOKENS, query.device)
    num_blocks = sum(-(-n // GPU_BLOCK_TOKENS) for n in tokens.lengths)
    key, value = (
        torch.zeros(
            num_blocks, GPU_BLOCK_TOKENS, heads, head_dim, dtype=kv_dtype, device=query.device
        )
        for _ in range(KV)
    )
    for at in slots:
        key.view(-1, heads, head_dim)[at] = tokens.key[: len(at)].to(kv_dtype)
        value.view(-1, heads, head_dim)[at] = tokens.value[: len(at)].to(kv_dtype)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    lengths = torch.tensor(tokens.lengths, dtype=torch.int32, device=query.device)
    more: dict[str, Any] = {"fa_version": version}
    if version == 3:
        more["scheduler_metadata"] = get_scheduler_metadata(
            batch, 1, max(tokens.lengths), num_q_heads, heads, head_dim, lengths,
            qkv_dtype=kv_dtype, cu_seqlens_q=starts, page_size=GPU_BLOCK_TOKENS, causal=True,
        )  # fmt: skip
    if is_fp8:
        one = torch.ones(1, 1, device=query.device).expand(batch, heads)
        more |= {"q_descale": one, "k_descale": one, "v_descale": one}
    asked, output = query.to(kv_dtype), torch.empty_like(query)

    def run() -> None:
        flash_attn_varlen_func(
            asked, key, value, 1, starts, max(tokens.lengths), seqused_k=lengths,
            softmax_scale=scale, causal=True, block_table=table, out=output, **more,
        )  # fmt: skip

    num_bytes = KV * sum(tokens.lengths) * heads * head_dim * kv_dtype.itemsize
    return run, output, num_bytes, f"vLLM flash-attention {version}"


def _torch_flash(query: Tensor, tokens: Tokens, scale: float) -> Made:
    """torch's flash-attention over a dense cache."""
    lengths, (batch, num_q_heads, head_dim) = tokens.lengths, query.shape
    if len(set(lengths)) > 1:
        raise NotImplementedError("torch's dense attention needs requests of one length")
    key, value = (
        x[: lengths[0]].transpose(0, 1).expand(batch, -1, -1, -1).contiguous()
        for x in (tokens.key, tokens.value)
    )
    heads, output = key.shape[1], torch.empty_like(query)
    # The group as queries: one read of a KV head serves all of them
    grouped = query.view(batch, heads, num_q_heads // heads, head_dim)

    def run() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(grouped, key, value, scale=scale)
        output.copy_(out.view_as(output))

    return run, output, key.nbytes + value.nbytes, "torch flash-attention"


def _turboquant(query: Tensor, tokens: Tokens, scale: float, name: str) -> Made:
    """A preset of vLLM's TurboQuant, as its backend calls it."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    head_dim, heads = query.shape[2], tokens.key.shape[1]
    config = TurboQuantConfig.from_cache_dtype(name, head_dim)
    table, slots = _blocks(tokens.lengths, GPU_BLOCK_TOKENS, query.device)
    num_blocks = sum(-(-n // GPU_BLOCK_TOKENS) for n in tokens.lengths)
    shape = (num_blocks, GPU_BLOCK_TOKENS, heads, config.slot_size_aligned)
    cache = torch.zeros(shape, dtype=torch.uint8, device=query.device)
    rotation = _build_hadamard(head_dim, query.device)
    centroids = get_centroids(head_dim, config.centroid_bits).to(query.device, torch.float32)
    ordered = centroids.sort().values
    formats = (config.key_packed_size, config.effective_value_quant_bits)
    for at in slots:
        key, value = tokens.key[: len(at)].contiguous(), tokens.value[: len(at)].contiguous()
        triton_turboquant_store(
            key, value, cache, at.to(torch.int32), rotation, (ordered[:-1] + ordered[1:]) / 2,
            config.key_mse_bits, *formats, key_fp8=config.key_fp8,
        )  # fmt: skip
    lengths = torch.tensor(tokens.lengths, dtype=torch.int32, device=query.device)
    output = torch.empty_like(query)
    buffers = {
        "mid_o_buf": torch.empty(
            *query.shape[:2], TURBOQUANT_SPLITS, head_dim + 1, device=query.device
        ),
        "output_buf": output,
        "lse_buf": torch.empty(query.shape[:2], device=query.device),
    }

    def run() -> None:
        triton_turboquant_decode_attention(
            query, cache, table, lengths, rotation, centroids, scale, config.key_mse_bits, *formats,
            key_fp8=config.key_fp8, norm_correction=config.norm_correction, PiT=rotation,
            max_num_kv_splits=TURBOQUANT_SPLITS, **buffers,
        )  # fmt: skip

    return run, output, config.slot_size * sum(tokens.lengths) * heads, f"vLLM {name}"
