#!/bin/sh
# Choose thresholds for the bundled model by 24 questions, then answer with them. Takes some minutes, and
# resumes where it was stopped. For another model: --model MODEL, and questions of your own.
set -eu
cd "$(dirname "$0")/.."
.venv/bin/diffkv calibrate --data examples/lm_eval/lists.jsonl --max-tokens 8 --max-loss 1% "$@"
exec .venv/bin/diffkv generate --calibration calibration.toml
