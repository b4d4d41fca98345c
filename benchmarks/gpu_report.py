"""Rows of `gpu.py`, the clock, and what rows are compared with: the bandwidth of a streaming copy."""

import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import torch
import triton
import triton.language as tl

HEADS, HEAD_DIM, DTYPE = 8, 128, torch.bfloat16
FLUSH_BYTES = 256 << 20


class Report:
    """Rows to a file and to the terminal, as they come."""

    def __init__(self, out: Path, minutes: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "gpu.jsonl").open("w")
        self.end = time.monotonic() + minutes * 60
        self.facts = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "triton": triton.__version__,
            "commit": os.environ.get("DIFFKV_COMMIT") or commit(),
        }  # fmt: skip
        self.rows: list[dict] = []
        print(self.facts, flush=True)

    def has_time(self, seconds: float = 0) -> bool:
        return time.monotonic() + seconds < self.end

    def row(self, **row) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(row | self.facts) + "\n")
        self.file.flush()
        print("  ".join(f"{k} {shown(v)}" for k, v in row.items()), flush=True)


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commit() -> str:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measure(fn, reps: int = 40, graph: bool = True) -> dict[str, float]:
    """Milliseconds of a call: median and 20/80 percentiles, L2 cold."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    call = fn
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            fn()
        call = captured.replay
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(reps)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return {
        "ms": statistics.median(times), "ms_p20": times[reps // 5], "ms_p80": times[-reps // 5]
    }  # fmt: skip


@triton.jit
def _copy_kernel(in_ptr, out_ptr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(out_ptr + at, tl.load(in_ptr + at))


@triton.jit
def _read_kernel(in_ptr, out_ptr, B: tl.constexpr, BLOCKS: tl.constexpr):
    total = tl.zeros([B], tl.int32)
    for block in range(BLOCKS):
        at = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * B + tl.arange(0, B)
        total += tl.load(in_ptr + at)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def copy_row(report: Report) -> float:
    """The bandwidth that shares are of: a streaming copy by Triton, bytes read and written."""
    block, blocks = 1024, 8
    a = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    b = torch.empty_like(a)
    programs = a.numel() // block
    rates = {}
    for name, num_bytes, fn in (
        ("copy", 2 * a.nbytes, lambda: _copy_kernel[(programs,)](a, b, block)),
        ("read", a.nbytes, lambda: _read_kernel[(programs // blocks,)](a, b, block, blocks)),
        ("torch copy", 2 * a.nbytes, lambda: b.copy_(a)),
    ):
        times = measure(fn, reps=20)
        rates[name] = num_bytes / times["ms"] / 1e6
        report.row(op=name, **times, gbs=rates[name])
    return rates["copy"]
