#!/usr/bin/env bash
# bash scripts/gpu_check.sh [PART...] [--dry_run] [--minutes 9] [--out results/gpu_check]
#
# All checks and timings that need a GPU, in one command: builds, tests, trainings, speed (scripts/gpu_check.py). It runs with the
# active Python if torch, torchvision, timm and einops are there, without the network; otherwise it installs what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for python in python python3; do
  if "$python" -c 'from importlib.util import find_spec as f; exit(not all(map(f, "einops timm torch torchvision".split())))' 2>&-; then
    exec "$python" -m scripts.gpu_check "$@"
  fi
done
# shellcheck source=scripts/setup.sh
EXTRA_MODULES="pytest" source scripts/setup.sh
exec python -m scripts.gpu_check "$@"
