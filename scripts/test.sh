#!/usr/bin/env bash
# bash scripts/test.sh   (installs what is missing, checks style, runs the tests; arguments go to pytest, e.g. -k losses)
set -euo pipefail

# shellcheck source=scripts/setup.sh
EXTRA_MODULES="pytest ruff safetensors" source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

cd "$ROOT"
python -m ruff check .
python -m pytest "$@"
