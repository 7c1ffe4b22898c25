"""Compiles CUDA sources with g++ and cuda_emulation.h, so that their kernels run on a CPU."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.processes import ROOT

from vmamba import extension, scan_cuda

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


@functools.cache
def emulated_scan() -> ctypes.CDLL:
    """The emulation of csrc/selective_scan/scan_cuda.cu."""
    with tempfile.TemporaryDirectory() as folder:
        return build_emulation(ROOT / "csrc" / "selective_scan" / "scan_cuda.cu", Path(folder))


def emulate_cuda(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Makes the backend `cuda` run on CPU tensors, by the emulation."""
    library = emulated_scan()
    monkeypatch.setattr(extension, "load", lambda name: library)
    monkeypatch.setattr(scan_cuda, "_current_stream", lambda device: nullcontext())  # stream: null
    monkeypatch.setattr(scan_cuda, "unavailable_reason", lambda device: None)
    configure_emulation(library)
    return library
