"""The attention that DiffKV is compared with: vLLM's own kernels, torch's where there are none.

vLLM is imported only when one of its kernels is asked for: its import changes threads and logging.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffkv.lab.bench.fill import Tokens
from diffkv.lab.bench.timing import Case

__all__ = ["dense_attention", "stock_cases"]

BLOCK_TOKENS = 128
FP8 = "fp8"
KV = 2


def dense_attention(query: Tensor, tokens: Tokens, scale: float) -> Tensor:
    """Decode attention in float32 over the uncompressed tokens: what every kernel approximates.

    Args:
        query: [R, num_q_heads, head_dim].
        tokens: of R requests.
        scale: of the dot products.

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
) -> tuple[list[tuple[Case, Tensor]], list[str]]:
    """What there is on a device, and what there is not.

    Returns:
        cases with the output that each writes, named `stock bf16` and `stock fp8`; and a line for
        each that cannot run here.
    """
    makers = (
        [("stock bf16", lambda: _torch_cuda(query, tokens, scale))]
        if device == "cuda"
        else [
            ("stock bf16", lambda: _vllm_cpu(query, tokens, scale, "auto")),
            ("stock fp8", lambda: _vllm_cpu(query, tokens, scale, FP8)),
        ]
    )
    cases, missing = [], []
    for name, make in makers:
        try:
            run, output, num_bytes, kernel = make()
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            missing.append(f"{name}: not here ({str(error).splitlines()[0]})")
            continue
        cases.append((Case(name, run, num_bytes, {"kernel": kernel}), output))
    if device == "cuda":
        missing.append("stock fp8: not measured on CUDA")
    return cases, missing


Made = tuple[Callable[[], object], Tensor, int, str]


def _vllm_cpu(query: Tensor, tokens: Tokens, scale: float, kv_dtype: str) -> Made:
    """vLLM's CPU kernel over blocks in random order, called as its CPU backend does."""
    import vllm._C  # noqa: F401, registers the operations
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype, (_, heads, head_dim) = query.dtype, tokens.key.shape
    isa = _get_attn_isa(dtype, BLOCK_TOKENS, head_dim, kv_dtype)
    # In an engine matrix products have asked for AMX before; without that its instructions are illegal.
    if isa == "amx" and not torch.cpu._init_amx():
        raise RuntimeError("the system does not let this process use AMX")
    blocks = [-(-n // BLOCK_TOKENS) for n in tokens.lengths]
    stored = torch.uint8 if kv_dtype == FP8 else dtype
    shape = (sum(blocks), heads, KV * BLOCK_TOKENS, head_dim)
    caches = torch.zeros(shape, dtype=stored).chunk(KV, dim=2)
    order = torch.randperm(sum(blocks)).to(torch.int32)
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    for row, ids in enumerate(order.split(blocks)):
        table[row, : len(ids)] = ids
        index = torch.arange(tokens.lengths[row])
        slots = ids.long()[index // BLOCK_TOKENS] * BLOCK_TOKENS + index % BLOCK_TOKENS
        ops.cpu_attn_reshape_and_cache(
            tokens.key[: len(index)], tokens.value[: len(index)], *caches, slots, isa,
            kv_cache_dtype=kv_dtype,
        )  # fmt: skip
    starts = torch.arange(len(blocks) + 1, dtype=torch.int32)
    lengths = torch.tensor(tokens.lengths, dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        len(blocks), query.shape[1], heads, head_dim, lengths, dtype, starts, True, -1, isa, True,
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


def _torch_cuda(query: Tensor, tokens: Tokens, scale: float) -> Made:
    """vLLM's flash-attention where it is installed, else torch's, over a dense cache."""
    lengths = tokens.lengths
    num_bytes = KV * sum(lengths) * tokens.key[0].numel() * query.element_size()
    output = torch.empty_like(query)
    key, value = (
        torch.cat([x[:n] for n in lengths]).contiguous() for x in (tokens.key, tokens.value)
    )
    starts_q = torch.arange(len(lengths) + 1, dtype=torch.int32, device=query.device)
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    starts_k = torch.tensor(ends, dtype=torch.int32, device=query.device)
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return _torch_sdpa(query, key, value, lengths, scale, output, num_bytes)

    def run() -> None:
        flash_attn_varlen_func(
            query, key, value, max_seqlen_q=1, cu_seqlens_q=starts_q, max_seqlen_k=max(lengths),
            cu_seqlens_k=starts_k, softmax_scale=scale, causal=True, out=output,
        )  # fmt: skip

    return run, output, num_bytes, "vLLM flash-attention"


def _torch_sdpa(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, output: Tensor,
    num_bytes: int,
) -> Made:  # fmt: skip
    if len(set(lengths)) > 1:
        raise NotImplementedError("torch's dense attention needs requests of one length")
    batch = len(lengths)
    k, v = (
        x.view(batch, lengths[0], *x.shape[1:]).transpose(1, 2).contiguous() for x in (key, value)
    )

    def run() -> None:
        out = scaled_dot_product_attention(query[:, :, None], k, v, scale=scale, enable_gqa=True)
        output.copy_(out[:, :, 0])

    return run, output, num_bytes, "torch scaled_dot_product_attention"
