#!/usr/bin/env bash
# Checks and timings of the Triton kernels on one GPU, from the repository root; needs torch >= 2.11 and
# triton >= 3.6, and neither vLLM nor an installed diffkv. Results: $OUT/gpu.jsonl and gpu.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/out}
mkdir -p "$out"
export PYTHONPATH=src
timeout 540 "${PYTHON:-python3}" -u benchmarks/gpu.py --out "$out" --minutes "${MINUTES:-8}" "$@" 2>&1 |
  tee "$out/gpu.txt"
