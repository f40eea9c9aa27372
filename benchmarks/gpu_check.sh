#!/usr/bin/env bash
# The first thing to run on a new GPU machine: does it work, how fast is it, how accurate.
#   benchmarks/gpu_check.sh a                      # 3 minutes: tests, doctor
#   benchmarks/gpu_check.sh b                      # 4 minutes: step times
#   benchmarks/gpu_check.sh c --data data/cifar100 # 6 minutes: speed_75, then r18_32
# Needs neither wandb nor albumentations, nor an installed package. See benchmarks/gpu_check.py --help.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" benchmarks/gpu_check.py "$@"
