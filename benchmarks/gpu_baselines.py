"""What decode attention is compared with: dense K and V, and vLLM's own kernels if it is installed."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from gpu_report import DTYPE, HEAD_DIM, HEADS, Report, measure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SCALE = HEAD_DIM**-0.5
LOG2_E = 1.4426950408889634
BLOCK_SIZE = 16
"""Tokens of a block, vLLM's default."""

TURBOQUANT = ("turboquant_k8v4", "turboquant_4bit_nc")
TURBOQUANT_SPLITS = 32
"""vLLM's default (`tq_max_kv_splits_for_cuda_graph`)."""


@triton.jit
def _dense_kernel(
    q_ptr, k_ptr, v_ptr, partial_ptr, lse_ptr, n, scale,
    G: tl.constexpr, D: tl.constexpr, B: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Baseline: plain split-KV decode attention over dense bf16 K and V [batch * heads, n, D]."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    g = tl.arange(0, 16)
    d = tl.arange(0, D)
    in_group = (g < G)[:, None]
    q = tl.load(q_ptr + (row * G + g)[:, None] * D + d[None, :], mask=in_group, other=0.0)
    each = tl.cdiv(tl.cdiv(n, SPLITS), B) * B
    most = tl.full([16], -1.0e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    sums = tl.zeros([16, D], tl.float32)
    for start in range(split * each, tl.minimum(split * each + each, n), B):
        t = start + tl.arange(0, B)
        at = (row * n + t)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at, mask=(t < n)[:, None], other=0.0).to(q.dtype)
        scores = tl.where((t < n)[None, :], tl.dot(q, tl.trans(k)) * scale, -1.0e30)
        new_most = tl.maximum(most, tl.max(scores, 1))
        decay = tl.exp2(most - new_most)
        p = tl.exp2(scores - new_most[:, None])
        most = new_most
        total = total * decay + tl.sum(p, 1)
        v = tl.load(v_ptr + at, mask=(t < n)[:, None], other=0.0).to(q.dtype)
        sums = sums * decay[:, None] + tl.dot(p.to(v.dtype), v)
    out = ((row * SPLITS + split) * 16 + g).to(tl.int64)
    tl.store(partial_ptr + out[:, None] * D + d[None, :], sums / tl.maximum(total, 1e-20)[:, None])
    tl.store(lse_ptr + out, most + tl.log2(tl.maximum(total, 1e-20)))


@triton.jit
def _dense_merge_kernel(
    partial_ptr, lse_ptr, out_ptr, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    at = (row * SPLITS + tl.arange(0, SPLITS)) * 16 + g
    lse = tl.load(lse_ptr + at)
    weight = tl.exp2(lse - tl.max(lse, 0))
    d = tl.arange(0, D)
    partial = tl.load(partial_ptr + at[:, None] * D + d[None, :])
    out = tl.sum(partial * (weight / tl.sum(weight, 0))[:, None], 0)
    tl.store(out_ptr + (row * G + g) * D + d, out.to(out_ptr.dtype.element_ty))


def baseline_rows(report: Report, batch: int, context: int, group: int, copy: float) -> None:
    """Attention over the same tokens without pages of ours, in two bytes, in one, in vLLM's formats."""
    shape = (batch, HEADS, context, HEAD_DIM)
    key, value = (torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(2))
    query = torch.randn(batch, HEADS * group, HEAD_DIM, dtype=DTYPE, device="cuda")
    some = query[:1].float().view(1, HEADS, group, HEAD_DIM)
    scores = some @ key[:1].float().transpose(2, 3) * SCALE
    want = (scores.softmax(-1) @ value[:1].float()).view(HEADS * group, HEAD_DIM)
    found = dense_calls(query, key, value)
    report_calls(report, found, want, batch, context, group, copy)
    try:
        import vllm.v1.attention.backends.turboquant_attn  # noqa: F401
    except ImportError as missing:
        print(f"vLLM's kernels are not measured: {missing}", flush=True)
        return
    report_calls(report, vllm_calls(query, key, value), want, batch, context, group, copy)


def report_calls(
    report: Report,
    calls: Iterator[tuple],
    want: Tensor,
    batch: int,
    context: int,
    group: int,
    copy: float,
) -> None:
    for name, fn, num_bytes, limit in calls:
        output = fn().view(batch, HEADS * group, HEAD_DIM)[0].float()
        error = float((output - want).norm() / want.norm())
        assert error < limit, f"{name} is wrong: {error}"
        times = measure(fn)
        rate = num_bytes / times["ms"] / 1e6
        report.row(
            op="attend", quant=name, batch=batch, context=context, kind="uniform", group=group,
            **times, gbs=rate, share=rate / copy, error=error, bytes=num_bytes,
        )  # fmt: skip


def dense_calls(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple]:
    """(name, function, bytes, largest relative error) over dense K and V."""
    batch, heads, context, _ = key.shape
    group, rows = query.shape[1] // heads, batch * heads
    splits = max(1, min(32, 1024 // rows))
    splits = 1 << (splits.bit_length() - 1)
    partial = torch.empty(rows * splits * 16, HEAD_DIM, device="cuda")
    lse, out = torch.empty(rows * splits * 16, device="cuda"), torch.empty_like(query)

    def dense(k: Tensor, v: Tensor) -> Tensor:
        _dense_kernel[(rows, splits)](
            query, k, v, partial, lse, context, SCALE * LOG2_E, group, HEAD_DIM, 64, splits,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        _dense_merge_kernel[(rows, group)](partial, lse, out, group, HEAD_DIM, splits)
        return out

    def sdpa() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            # the group as queries: one read serves all of them
            return scaled_dot_product_attention(
                query.view(batch, heads, group, HEAD_DIM), key, value, scale=SCALE
            )

    yield "bf16 dense triton", lambda: dense(key, value), 2 * key.nbytes, 1e-2
    yield "bf16 sdpa flash", sdpa, 2 * key.nbytes, 1e-2
    fp8 = [x.to(torch.float8_e4m3fn) for x in (key, value)]
    yield "fp8 dense triton", lambda: dense(*fp8), key.nbytes, 0.1


def vllm_calls(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple]:
    """The same of vLLM's kernels, as its backends call them, over blocks in random order."""
    batch, heads, context, _ = key.shape
    num_blocks = batch * context // BLOCK_SIZE
    order = torch.randperm(num_blocks, device="cuda")
    block_table = order.view(batch, -1).to(torch.int32)
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    blocks = []
    for x in (key, value):
        paged = torch.empty(num_blocks, BLOCK_SIZE, heads, HEAD_DIM, dtype=DTYPE, device="cuda")
        paged[order] = x.transpose(1, 2).reshape(paged.shape)
        blocks.append(paged)
    yield "vllm fa3 bf16", flash_call(query, *blocks, block_table, lens), 2 * key.nbytes, 1e-2
    fp8 = [x.to(torch.float8_e4m3fn) for x in (query, *blocks)]
    del blocks, paged
    yield "vllm fa3 fp8", flash_call(*fp8, block_table, lens), key.nbytes, 0.1
    del fp8
    for name in TURBOQUANT:
        fn, token_bytes = turboquant_call(name, query, key, value, block_table, lens)
        yield f"vllm {name}", fn, token_bytes * batch * heads * context, 0.3


def flash_call(query: Tensor, key: Tensor, value: Tensor, block_table: Tensor, lens: Tensor):
    """flash-attention 3 over blocks; its schedule is made once, as vLLM makes it once a step."""
    from vllm.vllm_flash_attn.flash_attn_interface import (
        flash_attn_varlen_func,
        get_scheduler_metadata,
    )

    batch, num_q_heads, _ = query.shape
    heads, longest = key.shape[2], block_table.shape[1] * BLOCK_SIZE
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    schedule = get_scheduler_metadata(
        batch, 1, longest, num_q_heads, heads, HEAD_DIM, lens, qkv_dtype=key.dtype,
        cu_seqlens_q=starts, page_size=BLOCK_SIZE, causal=True,
    )  # fmt: skip
    one = torch.ones(1, 1, device="cuda").expand(batch, heads) if key.element_size() == 1 else None
    out = torch.empty(query.shape, dtype=DTYPE, device="cuda")

    def call() -> Tensor:
        flash_attn_varlen_func(
            query, key, value, 1, starts, longest, seqused_k=lens, softmax_scale=SCALE, causal=True,
            block_table=block_table, out=out, scheduler_metadata=schedule, fa_version=3,
            q_descale=one, k_descale=one, v_descale=one,
        )  # fmt: skip
        return out

    return call


def turboquant_call(
    name: str, query: Tensor, key: Tensor, value: Tensor, block_table: Tensor, lens: Tensor
):
    """(function, bytes of a token and head) of a preset of vLLM's TurboQuant."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    config = TurboQuantConfig.from_cache_dtype(name, HEAD_DIM)
    batch, heads, context, _ = key.shape
    cache = torch.zeros(
        block_table.numel(), BLOCK_SIZE, heads, config.slot_size_aligned, dtype=torch.uint8,
        device="cuda",
    )  # fmt: skip
    turn = _build_hadamard(HEAD_DIM, "cuda")
    centroids = get_centroids(HEAD_DIM, config.centroid_bits).to("cuda", torch.float32)
    ordered = centroids.sort().values
    formats = (config.key_packed_size, config.effective_value_quant_bits)
    at = torch.arange(context, device="cuda")
    for i in range(batch):
        slots = block_table[i][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        vectors = (x[i].transpose(0, 1).contiguous() for x in (key, value))
        triton_turboquant_store(
            *vectors, cache, slots.to(torch.int32), turn, (ordered[:-1] + ordered[1:]) / 2,
            config.key_mse_bits, *formats, key_fp8=config.key_fp8,
        )  # fmt: skip
    buffers = {
        "mid_o_buf": torch.empty(*query.shape[:2], TURBOQUANT_SPLITS, HEAD_DIM + 1, device="cuda"),
        "output_buf": torch.empty_like(query),
        "lse_buf": torch.empty(query.shape[:2], device="cuda"),
    }

    def call() -> Tensor:
        return triton_turboquant_decode_attention(
            query, cache, block_table, lens, turn, centroids, SCALE, config.key_mse_bits, *formats,
            key_fp8=config.key_fp8, norm_correction=config.norm_correction, PiT=turn,
            max_num_kv_splits=TURBOQUANT_SPLITS, **buffers,
        )  # fmt: skip

    return call, config.slot_size
