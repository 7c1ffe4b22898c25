#!/usr/bin/env bash
# bash scripts/test.sh   (installs what is missing, checks style, runs the tests; arguments go to pytest, e.g. -k losses)
#
# WORKERS: test processes, by default as many as there are cores, at most 4; 0 runs the tests in one process (for --pdb).
set -euo pipefail

# shellcheck source=scripts/setup.sh
EXTRA_MODULES="pytest xdist ruff safetensors fvcore" source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

cd "$ROOT"
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# Each process has one thread: two processes whose threads wait for each other on the same cores are slower than one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m ruff check .
python -m pytest -n "${WORKERS:-$((cores < 4 ? cores : 4))}" --dist loadfile "$@"
