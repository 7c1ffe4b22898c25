# source scripts/setup.sh   (bash scripts/setup.sh only installs; quickstart.sh and test.sh source this file)
#
# Afterwards `python` is one that imports every package: the active environment's where it does, else that of .venv.
# The compiled selective scan of VMamba is built in place (csrc/selective_scan) where there is a compiler; without one, all goes
# on with plain PyTorch. SCAN_CUDA=1 builds its CUDA part as well (minutes), by default only where there is a GPU.
# EXTRA_MODULES: modules that must import besides those of requirements.txt (test.sh: "pytest ruff safetensors").
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
REQUIREMENTS=("$ROOT/requirements.txt" "$ROOT/requirements-dev.txt") # the second one includes the first

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

# is_ready PYTHON: does it import everything? Prints why not.
# torch and torchvision are imported for real: a pair that does not match fails only then.
is_ready() {
  # shellcheck disable=SC2086  # EXTRA_MODULES: one word per module
  "$1" - torch torchvision timm einops numpy PIL yaml scipy fvcore sklearn matplotlib ${EXTRA_MODULES:-} 2>&1 <<'PYTHON'
import sys

if sys.version_info < (3, 10):
    sys.exit("Python %d.%d, older than 3.10" % sys.version_info[:2])
from importlib.util import find_spec

missing = [name for name in sys.argv[1:] if find_spec(name) is None]
if missing:
    sys.exit("no " + ", ".join(missing))
try:
    import torch
    import torchvision
except (ImportError, OSError, RuntimeError) as error:
    sys.exit("torch or torchvision does not load: " + str(error).splitlines()[0])
if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 6):
    sys.exit("torch " + torch.__version__ + ", older than 2.6")
PYTHON
}

# find_base: prints the executable of a Python >= 3.10 that can make virtual environments.
find_base() {
  local name found old="" without_pip=""
  for name in python3 python python3.13 python3.12 python3.11 python3.10; do
    found=$("$name" -c 'import sys; print(sys.executable)' 2>/dev/null) || continue
    if ! "$found" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
      old=$found
    elif ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
      without_pip=$found
    else
      echo "$found"
      return
    fi
  done
  if [[ $without_pip ]]; then
    die "$without_pip cannot make virtual environments (no ensurepip). Debian, Ubuntu: apt install python3-venv;" \
      "with conda: conda env create -f CLeVER.yml && conda activate CLeVER. Then run this again."
  fi
  die "needs Python >= 3.10, found ${old:-none}. With conda: conda env create -f CLeVER.yml && conda activate CLeVER"
}

# setup_venv: .venv with everything installed. The stamp, a copy of the requirements, is written last,
# so an installation that was interrupted has none and is taken up again.
setup_venv() {
  local base reason stamp=$VENV/.installed-requirements
  if [[ -e $VENV ]] && ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "$VENV is broken or unfinished, making it again"
    rm -rf "$VENV"
  fi
  if [[ ! -e $VENV ]]; then
    base=$(PATH=${PATH//"$VENV/bin:"/} find_base)
    say "making the virtual environment $VENV with $base"
    "$base" -m venv "$VENV" || die "could not make $VENV"
  fi
  if cat "${REQUIREMENTS[@]}" | cmp -s - "$stamp" && is_ready "$VENV/bin/python" >/dev/null; then
    say "using $VENV, which has every package"
    return
  fi
  rm -f "$stamp"
  say "installing requirements.txt and requirements-dev.txt into $VENV (about 3 GB to download, 6 GB on disk, most of it" \
    "torch with CUDA)"
  "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off --requirement "${REQUIREMENTS[1]}" ||
    die "the installation stopped, see above; run this again to continue it"
  reason=$(is_ready "$VENV/bin/python") || die "installed, but $VENV/bin/python has a problem: $reason"
  cat "${REQUIREMENTS[@]}" > "$stamp"
}

# setup: the active python or python3 where it has everything, else .venv.
setup() {
  local name reason
  for name in python python3; do
    command -v "$name" >/dev/null || continue
    if reason=$(is_ready "$name"); then
      say "using $(command -v "$name"), which has every package"
      if [[ $name == python3 ]]; then # this machine has no usable command `python`: make one
        mkdir -p "$ROOT/build/bin"
        ln -sf "$(python3 -c 'import sys; print(sys.executable)')" "$ROOT/build/bin/python"
        export PATH="$ROOT/build/bin:$PATH"
      fi
      return
    fi
    [[ -e $VENV ]] || say "not using $(command -v "$name"): $reason"
  done
  setup_venv
  export PATH="$VENV/bin:$PATH"
}

# build_scan: builds the compiled scan unless it is there, of these sources. What fails is told and left.
build_scan() {
  local wanted cuda=0
  [[ ! -e /dev/nvidiactl ]] || cuda=1
  wanted=$(python - "$ROOT/csrc/selective_scan" "${SCAN_CUDA:-$cuda}" "${SCAN_CUDA:-}" <<'PYTHON'
import json
import os
import runpy
import sys
from pathlib import Path

folder = Path(sys.argv[1])
script = runpy.run_path(str(folder / "setup.py"))
facts = folder / script["PACKAGE"] / "build.json"
built = json.loads(facts.read_text()) if facts.is_file() else {}
done = built.get("sources_sha256") == script["sources_sha256"]()
if done and sys.argv[2] == "1":
    done = "cuda" in built or (sys.argv[3] != "1" and script["find_nvcc"](os.environ) is None)
print("no" if done else "yes")
PYTHON
  ) || { say "the selective scan is not compiled (see above): VMamba runs on plain PyTorch"; return; }
  [[ $wanted == yes ]] || return 0
  say "compiling the selective scan"
  [[ $cuda == 0 ]] || cuda="" # a GPU: its part is built if possible
  (cd "$ROOT/csrc/selective_scan" && SCAN_CUDA=${SCAN_CUDA-$cuda} python - <<'PYTHON'
import os
import runpy
import sys
from pathlib import Path

script = runpy.run_path("setup.py")
try:
    script["build"](Path.cwd() / script["PACKAGE"], os.environ)
except script["BuildError"] as error:
    sys.exit(f"selective scan: {error}")
PYTHON
  ) || say "the selective scan is not compiled (see above): VMamba runs on plain PyTorch, more slowly"
}

setup
build_scan
