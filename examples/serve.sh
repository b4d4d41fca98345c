#!/bin/sh
# Serve the bundled model with a compressed cache: OpenAI API at http://127.0.0.1:8000/v1, gauges at
# /metrics. With --drops, requests may set diffkv_alpha_low. Further arguments go to `vllm serve`:
# examples/serve.sh --port 8001
set -eu
cd "$(dirname "$0")/.."
exec .venv/bin/diffkv serve reference --drops \
    --host 127.0.0.1 --enforce-eager --max-model-len 2048 --kv-cache-memory-bytes 67108864 "$@"
