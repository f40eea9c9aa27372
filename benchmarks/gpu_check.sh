#!/usr/bin/env bash
# Check a new GPU machine: correctness, speed, accuracy.
#   benchmarks/gpu_check.sh a                      # 3 minutes: tests, doctor
#   benchmarks/gpu_check.sh b                      # 4 minutes: step times
#   benchmarks/gpu_check.sh c --data data/cifar100 # 6 minutes: speed_75, then r18_32
# Needs no wandb, no albumentations and no installation. Options: benchmarks/gpu_check.py --help.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" benchmarks/gpu_check.py "$@"
