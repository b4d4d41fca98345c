#!/usr/bin/env bash
# Checks and timings of the Triton kernels on one GPU, from the repository root; needs torch >= 2.11 and
# triton >= 3.6, and no installed diffkv. Where vLLM is installed, its kernels are timed beside ours; where
# matplotlib is, there are plots. Results: $OUT/gpu.jsonl, gpu.txt, gpu-attention.png.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/out}
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
timeout 540 "${PYTHON:-python3}" -u benchmarks/gpu.py --out "$out" --minutes "${MINUTES:-8}" "$@" 2>&1 |
  tee "$out/gpu.txt"
"${PYTHON:-python3}" benchmarks/gpu_plots.py "$out"
