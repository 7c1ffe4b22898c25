"""Builds the compiled selective scans: libscan_cpu.so and, where nvcc is found, libscan_cuda.so.

python csrc/selective_scan/setup.py build_ext --inplace    into this folder, unless it is up to date there (--force: anyway)
pip install ./csrc/selective_scan                          into the active environment

The libraries have a plain C interface (scan.h) and need neither torch nor Python's headers: one build serves every
version of both. A GPU is not needed either. Environment:

CXX                    C++17 compiler; default: the first of g++, c++, clang++ on PATH
SCAN_CUDA              0: leave the CUDA library out; 1: fail when it cannot be built; default: build it if possible
CUDA_HOME              where bin/nvcc is; default: nvcc on PATH, then /usr/local/cuda
TORCH_CUDA_ARCH_LIST   "8.0;9.0+PTX" or "8.0 9.0"; default: all that the toolkit supports, with PTX of the last
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip runs this file without its folder on the path

from build_tool import SELECTIVE_SCAN  # noqa: E402
from setup_commands import setup_library  # noqa: E402

if __name__ == "__main__":
    setup_library(SELECTIVE_SCAN)
