"""Builds the compiled renderer of views: libviews_cpu.so.

python csrc/views/setup.py build_ext --inplace    into this folder, unless it is up to date there (--force: anyway)
pip install ./csrc/views                          into the active environment

The library has a plain C interface (views.h) and needs neither torch nor Python's headers: one build serves every version of
both. The build tool is that of the selective scan, beside this folder. Environment:

CXX    C++17 compiler; default: the first of g++, c++, clang++ on PATH
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "selective_scan"))  # the build tool

from build_tool import VIEWS  # noqa: E402
from setup_commands import setup_library  # noqa: E402

if __name__ == "__main__":
    setup_library(VIEWS)
