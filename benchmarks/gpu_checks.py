"""Every operation of the Triton kernels against the reference, on one GPU."""

import dataclasses
from itertools import accumulate

import torch
from gpu_report import DTYPE, HEAD_DIM, Report
from make import assert_same, make_state, make_sums, make_tiers, make_tokens

from diffkv import ops, pool, reference
from diffkv.cache import DiffKVCache
from diffkv.kernels import triton as kernels
from diffkv.layout import PageLayout
from diffkv.policy import Thresholds
from diffkv.quant import QuantConfig
from diffkv.rotation import signs
from diffkv.shape import PoolShape
from diffkv.state import TENSORS, PoolState, PromptTokens
from diffkv.steps import PromptChunk


def on_gpu(state: PoolState) -> PoolState:
    return dataclasses.replace(state, **{name: getattr(state, name).cuda() for name in TENSORS})


def on_cpu(state: PoolState) -> PoolState:
    return dataclasses.replace(state, **{name: getattr(state, name).cpu() for name in TENSORS})


def tokens_on_gpu(tokens: PromptTokens) -> PromptTokens:
    return PromptTokens(*(getattr(tokens, f.name).cuda() for f in dataclasses.fields(tokens)))


def check_vectors() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_dim in (64, 80, 128, 256):
            x = (torch.randn(70, head_dim) * 3).to(dtype)
            x[-1], x[-2, 0], x[-3, 1] = 1.5, float("nan"), float("inf")
            for bits in (1, 2, 4, 8):
                for groups in (1, 2, 4):
                    codes, meta = kernels.quantize(x.cuda(), bits, groups)
                    want_codes, want_meta = reference.quantize(x, bits, groups)
                    assert torch.equal(meta.cpu(), want_meta), f"meta {dtype} {head_dim} {bits}"
                    assert torch.equal(codes.cpu(), want_codes), f"codes {dtype} {head_dim} {bits}"
                    got = kernels.dequantize(codes, meta, bits, dtype).cpu()
                    want = reference.dequantize(want_codes, want_meta, bits, dtype)
                    assert torch.equal(got, want), f"dequantize {dtype} {head_dim} {bits}"


def check_life(
    quant: str, head_dim: int, dtype: torch.dtype, group: int, drops: bool
) -> dict[str, float]:
    """A few requests from prompt to release: bytes equal, outputs and sums close."""
    expected = make_state(quant, head_dim, dtype, num_layers=2, max_tokens=120, drops=drops)
    expected.prompt_lens.copy_(torch.tensor([70, 33, 5]))
    expected.thresholds[:, 0] = 3.0 if expected.layout.low else 1.0
    expected.thresholds[:, 1] = 1.0 if drops else 0.0
    expected.pages.copy_(torch.randint(0, 256, expected.pages.shape, dtype=torch.uint8))
    state = on_gpu(expected)
    for layer in range(2):
        tokens = make_tokens(expected, [0, -1, 2, 1], [70, 7, 5, 33])
        tiers, sums = make_tiers(expected, 115), make_sums(expected, 115)
        kernels.store_prompt(state, layer, tokens_on_gpu(tokens), tiers.cuda(), sums.cuda())
        reference.store_prompt(expected, layer, tokens, tiers, sums)
    assert_same(on_cpu(state), expected)
    for got, want in zip(
        kernels.gather(state, 1, 0, 71), reference.gather(expected, 1, 0, 71), strict=True
    ):
        assert torch.equal(got.cpu(), want), "gather"
    worst_output = worst_sum = 0.0
    for i in range(6):
        slots = torch.tensor([0, -1, 2, 1], dtype=torch.int32)
        lens = torch.tensor([71 + i, 3, 6 + i, 34 + i], dtype=torch.int32)
        plan = kernels.plan_decode(state, slots.cuda(), lens.cuda())
        expected_plan = reference.plan_decode(expected, slots, lens)
        assert torch.equal(plan.places.cpu(), expected_plan.places), "places"
        for layer in range(2):
            key = torch.randn(4, 2, head_dim).to(dtype)
            value = torch.randn(4, 2, head_dim).to(dtype)
            query = torch.randn(4, 2 * group, head_dim).to(dtype)
            kernels.append(state, layer, plan, key.cuda(), value.cuda())
            reference.append(expected, layer, expected_plan, key, value)
            assert_same(on_cpu(state), expected)
            output, want = torch.full_like(query, torch.nan).cuda(), torch.empty_like(query)
            kernels.attend(state, layer, slots.cuda(), query.cuda(), head_dim**-0.5, output)
            reference.attend(expected, layer, slots, query, head_dim**-0.5, want)
            difference = (output.cpu().float() - want.float()).norm() / want.float().norm()
            worst_output = max(worst_output, float(difference))
            worst_sum = max(worst_sum, sum_error(on_cpu(state), expected))
            state.pages.copy_(expected.pages)  # from the same sums on, the same decisions
    everything = torch.tensor([2, 0, 1], dtype=torch.int32)
    kernels.release(state, everything.cuda(), -1)
    reference.release(expected, everything, -1)
    assert_same(on_cpu(state), expected)
    limit = 1e-4 if dtype is torch.float32 else 6e-3
    assert worst_output < limit and worst_sum < 2e-3, (quant, worst_output, worst_sum)
    return {"output_error": worst_output, "sum_error": worst_sum}


def sum_error(state: PoolState, expected: PoolState) -> float:
    """Largest difference of two pools whose pages differ in significance sums only."""
    different = (state.pages != expected.pages).nonzero()
    worst = 0.0
    allowed = torch.zeros(state.layout.page_bytes, dtype=torch.bool)
    for tier in state.layout.tiers:
        allowed[tier.sums : tier.positions] = True
    for page in different[:, 0].unique().tolist():
        for tier in state.layout.tiers:
            got = state.pages[page, tier.sums : tier.positions].view(torch.float32)
            want = expected.pages[page, tier.sums : tier.positions].view(torch.float32)
            close = (got - want).abs()
            worst = max(worst, float(close[want.abs() < 1e3].nan_to_num(0).max()))
            break
    assert allowed[different[:, 1]].all(), "bytes beside the sums differ"
    return worst


def check_significance() -> float:
    lens, query_lens = [300, 1, 70], [80, 1, 70]
    query, key = torch.randn(151, 8, 128).bfloat16(), torch.randn(371, 2, 128).bfloat16()
    starts = [
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (query_lens, lens)
    ]
    want = reference.significance(query, key, *starts, 128**-0.5, 64)
    cuda = (x.cuda() for x in (query, key, *starts))
    error = float((kernels.significance(*cuda, 128**-0.5, 64).cpu() - want).abs().max())
    assert error < 1e-3, error
    return error


def check_prompts_without_waiting(rotate: bool) -> float:
    """Two steps of prompts, in chunks and whole, in which no layer may wait for the GPU.

    Returns:
        The largest difference of the outputs from those of the operations in plain torch, on the CPU.
    """
    batches = ([(0, 0, 300, 300), (1, 0, 100, 200)], [(2, 0, 150, 150), (1, 100, 200, 200)])
    rows = [sum(end - start for _, start, end, _ in batch) for batch in batches]
    shapes = [(n, heads, HEAD_DIM) for n in rows for heads in (4, 2, 2)]
    vectors = [torch.randn(shape).to(DTYPE) for shape in shapes]
    outputs = []
    for device in ("cpu", "cuda"):
        layout = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), HEAD_DIM)
        shape = PoolShape.fit(8 << 20, layout, 1, 2, 512, 3)
        buffer = torch.zeros(8 << 20, dtype=torch.uint8, device=device)
        state = pool.create(shape, buffer, DTYPE, window=64)
        chosen = signs(HEAD_DIM).to(device) if rotate else None
        operations = ops.load(device, "reference" if device == "cpu" else None)
        cache = DiffKVCache(state, operations, HEAD_DIM**-0.5, signs=chosen)
        cache.warm_up(4)
        for slot, length in enumerate((300, 200, 150)):
            cache.open(slot, length, Thresholds(3.0, 0.0))
        inputs = iter([vector.to(device) for vector in vectors])
        results = [torch.empty(n, 4, HEAD_DIM, dtype=DTYPE, device=device) for n in rows]
        none = torch.empty(0, dtype=torch.int32, device=device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        for batch, result in zip(batches, results, strict=True):
            ends = accumulate(end - start for _, start, end, _ in batch)
            chunks = [
                PromptChunk(slot, slice(row - (end - start), row), start, length)
                for row, (slot, start, end, length) in zip(ends, batch, strict=True)
            ]
            step = cache.plan(chunks, slice(0, 0), none, none)
            cache.attend(0, step, next(inputs), next(inputs), next(inputs), result)
        torch.cuda.set_sync_debug_mode("default")
        outputs.append(torch.cat(results).cpu().float())
    error = float((outputs[0] - outputs[1]).abs().max())
    assert error < 0.05, error
    return error


def checks(report: Report) -> None:
    torch.manual_seed(0)
    check_vectors()
    print("quantize, dequantize: bit-exact", flush=True)
    report.row(check="significance", sum_error=check_significance())
    for rotate in (False, True):
        error = check_prompts_without_waiting(rotate)
        report.row(check="prompts, nothing waits", rotate=rotate, output_error=error)
    for quant, head_dim, dtype, group in (
        ("k8v4-k4v2", 128, torch.bfloat16, 4), ("k8v4g1x2-k4v2g2x4", 80, torch.float16, 3),
        ("k16v16", 128, torch.bfloat16, 8), ("k8v2-k2v1g1x4", 64, torch.float32, 16),
        ("k8v8", 256, torch.bfloat16, 1), ("k4v1", 96, torch.float16, 2),
        ("k8v2", 128, torch.bfloat16, 8), ("k16v16", 64, torch.float32, 2),
    ):  # fmt: skip
        for drops in (False, True):
            report.row(
                check=quant,
                head_dim=head_dim,
                dtype=str(dtype),
                drops=drops,
                **check_life(quant, head_dim, dtype, group, drops),
            )
