"""Builds the compiled selective scan: libscan_cpu.so and, where nvcc is found, libscan_cuda.so.

python csrc/selective_scan/setup.py build_ext --inplace    into this folder, unless it is up to date there (--force: anyway)
pip install ./csrc/selective_scan                          into the active environment

The libraries have a plain C interface (scan.h, scan_cuda.h): one build serves every version of Python and torch. A GPU is
not needed either. Environment variables: see csrc/build_tool.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the build tool

from build_tool import SELECTIVE_SCAN, main  # noqa: E402

if __name__ == "__main__":
    main(SELECTIVE_SCAN)
