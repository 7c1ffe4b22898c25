#!/usr/bin/env bash
# bash scripts/gpu_check.sh   (with an NVIDIA GPU and nvcc: builds the CUDA scan, runs all tests, times scan, step and views)
set -euo pipefail

export SCAN_CUDA=1 EXTRA_MODULES="pytest ruff safetensors"
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

cd "$ROOT"
python -m scripts.doctor
python - <<'PYTHON'
import sys

import torch

from vmamba import scan_cuda

reason = scan_cuda.unavailable_reason(torch.device("cuda")) if torch.cuda.is_available() else "torch sees no GPU"
if reason:
    sys.exit(f"gpu_check: the CUDA scan cannot run: {reason}")
PYTHON
python -m pytest -m "not slow or gpu" "$@"
python -m scripts.bench.scan --device cuda --dtype bf16 --batch 64 64 --no-loop --output results/bench_scan_cuda.json
python -m scripts.bench.pretrain --arch vit_small --batch_size 64 --amp_dtype bf16 --output results/bench_step_cuda.json
python -m scripts.bench.views --output results/bench_views.json
# Does the GPU wait for its images, and how many cores does it need?
python -m scripts.bench.loader --arch vit_small --batch_size 64 --amp_dtype bf16 --num_workers "$(($(nproc) - 1))" \
  --steps 50 --output results/bench_loader_cuda.json
