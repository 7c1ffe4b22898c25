# source scripts/setup.sh   (as quickstart.sh and test.sh do; bash scripts/setup.sh only installs)
#
# Afterwards `python` can import every package: it is that of the active environment if it has all packages, else of .venv.
# VMamba's selective scan is compiled in csrc/selective_scan if there is a compiler; otherwise it runs on plain PyTorch.
# SCAN_CUDA=1 also compiles its CUDA part, which takes minutes; by default this happens only on a machine with a GPU.
# EXTRA_MODULES: modules that are needed in addition to those of requirements.txt (see test.sh).
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
REQUIREMENTS=("$ROOT/requirements.txt" "$ROOT/requirements-dev.txt") # the second one includes the first

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

# is_ready PYTHON: succeeds if it has all packages in usable versions; otherwise prints the reason.
# torch and torchvision are really imported: versions that do not match fail only then.
is_ready() {
  # shellcheck disable=SC2086  # EXTRA_MODULES: one word per module
  "$1" - torch torchvision timm einops numpy PIL yaml tqdm scipy sklearn matplotlib pandas filelock jinja2 ${EXTRA_MODULES:-} 2>&1 <<'PYTHON'
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

# find_base: print the executable of a Python >= 3.10 that can create virtual environments.
find_base() {
  local name
  for name in python3 python python3.13 python3.12 python3.11 python3.10; do
    "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10)); ' 2> /dev/null || continue
    "$name" -c 'import sys; print(sys.executable)'
    return
  done
  die "needs a Python >= 3.10 that creates virtual environments (Debian, Ubuntu: apt install python3-venv), or" \
    "conda env create -f CLeVER.yml && conda activate CLeVER. Then run this again."
}

# setup_venv: create or update .venv. The stamp, a copy of the requirements, is written last: an interrupted installation
# has no stamp and is continued by the next call.
setup_venv() {
  local base reason stamp=$VENV/.installed-requirements
  if [[ -e $VENV ]] && ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "$VENV is broken or unfinished, creating it again"
    rm -rf "$VENV"
  fi
  if [[ ! -e $VENV ]]; then
    base=$(PATH=${PATH//"$VENV/bin:"/} find_base)
    say "creating the virtual environment $VENV with $base"
    "$base" -m venv "$VENV" || die "could not create $VENV"
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

# setup: choose the active python or python3 if it has all packages, else .venv.
setup() {
  local name reason
  for name in python python3; do
    command -v "$name" >/dev/null || continue
    if reason=$(is_ready "$name"); then
      say "using $(command -v "$name"), which has every package"
      if [[ $name == python3 ]]; then # there is no usable command `python`: create one
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

# build_libraries: builds the compiled scan and renderer unless up-to-date builds are there. A failure is only reported.
build_libraries() {
  local cuda=0 # no GPU: without the CUDA library
  [[ ! -e /dev/nvidiactl ]] || cuda="" # a GPU: with it, if it can be built
  SCAN_CUDA=${SCAN_CUDA-$cuda} python "$ROOT/csrc/selective_scan/setup.py" build_ext --inplace ||
    say "the selective scan is not compiled (see above): VMamba runs on plain PyTorch, more slowly"
  python "$ROOT/csrc/views/setup.py" build_ext --inplace ||
    say "the view renderer is not compiled (see above): views are rendered by torchvision and Pillow, more slowly"
}

setup
build_libraries
