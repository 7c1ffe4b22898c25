"""Builds the compiled renderer of views: libviews_cpu.so.

python csrc/views/setup.py build_ext --inplace    into this folder, unless it is up to date there (--force: anyway)
pip install ./csrc/views                          into the active environment

The library has a plain C interface (views.h): one build serves every version of Python. Environment: see csrc/build_tool.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the build tool

from build_tool import VIEWS, main  # noqa: E402

if __name__ == "__main__":
    main(VIEWS)
