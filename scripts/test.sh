#!/usr/bin/env bash
# bash scripts/test.sh   (sets up what is needed, then style and tests; arguments go to pytest, such as -k losses)
set -euo pipefail

# shellcheck source=scripts/setup.sh
EXTRA_MODULES="pytest ruff safetensors" source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

cd "$ROOT"
python -m ruff check .
python -m pytest "$@"
