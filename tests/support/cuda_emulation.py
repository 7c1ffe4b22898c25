"""Compiles CUDA sources with g++ and cuda_emulation.h, so that their kernels run on a CPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

SHARED_MEMORY = 227 << 10  # bytes that a block can have on an H100
# -O1 keeps the build short. An access that a GPU would find misaligned is an illegal instruction here.
FLAGS = "-std=c++17 -O1 -fPIC -shared -w -x c++ -DSCAN_CUDA_EMULATION -fno-strict-aliasing -U_FORTIFY_SOURCE"
FLAGS += " -fsanitize=alignment,signed-integer-overflow -fsanitize-undefined-trap-on-error"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")


def build_emulation(source: Path, folder: Path) -> ctypes.CDLL:
    """Compiles a CUDA source into `folder` and loads the library."""
    output = folder / f"{source.stem}.so"
    subprocess.run(["g++", *FLAGS.split(), f"-I{Path(__file__).parent}", str(source), "-o", str(output)], check=True)
    return ctypes.CDLL(str(output))


def configure_emulation(library: ctypes.CDLL, seed: int = 0, shared_memory: int = SHARED_MEMORY) -> None:
    """With seed 0 threads run in order, otherwise in a random one; `shared_memory`: what the device has per block."""
    library.emulation_configure(ctypes.c_uint64(seed), shared_memory)
