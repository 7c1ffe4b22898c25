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

import os
import sys
from pathlib import Path

try:
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
except ImportError as error:
    sys.exit(f"selective scan: {error}: pip install 'setuptools>=70.1'")

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # older than 70.1: enough for a build in place, and pip brings its own
    bdist_wheel = None

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # pip runs this file without its folder on the path

from build_tool import SELECTIVE_SCAN, BuildError, build, is_up_to_date  # noqa: E402


class BuildLibraries(build_ext):
    """Builds the libraries instead of Python extension modules."""

    def run(self) -> None:
        library = SELECTIVE_SCAN
        folder = (HERE if self.inplace else Path(self.build_lib)) / library.package
        try:
            if self.inplace and not self.force and is_up_to_date(library, folder, os.environ):
                library.say(f"the build in {folder} is up to date")
            else:
                build(library, folder, os.environ)
        except BuildError as error:
            sys.exit(f"{library.title}: {error}")


COMMANDS: dict[str, type] = {"build_ext": BuildLibraries}

if bdist_wheel is not None:

    class AnyPythonWheel(bdist_wheel):
        """A wheel for this platform and every version of Python."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    COMMANDS["bdist_wheel"] = AnyPythonWheel


if __name__ == "__main__":
    os.chdir(HERE)  # setuptools reads the pyproject.toml of the working directory
    setup(
        packages=[SELECTIVE_SCAN.package],
        ext_modules=[Extension(f"{SELECTIVE_SCAN.package}.libraries", sources=[])],  # makes setuptools run build_ext
        cmdclass=COMMANDS,
        verbose=False,  # only our own lines
    )
