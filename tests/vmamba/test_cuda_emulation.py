"""The emulation of CUDA on the CPU (support/cuda_emulation.h) finds the mistakes that it is there for."""

import ctypes
from pathlib import Path

import torch
from support.cuda_emulation import build_emulation, configure_emulation, needs_compiler
from torch import Tensor

MISTAKES = r"""
#include "cuda_emulation.h"

void no_barrier(float* out) {
  SHARED_MEMORY(shared);
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[63 - threadIdx.x];
}
void barrier(float* out) {
  SHARED_MEMORY(shared);
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}
void some_miss_the_barrier(float*) {
  if (threadIdx.x < 40) __syncthreads();
}
void some_miss_the_shuffle(float* out) {
  if (threadIdx.x % 32 < 8) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, out[threadIdx.x], 1);
}

extern "C" const char* run(int number, float* out, int shared) {
  void (*const kernels[])(float*) = {no_barrier, barrier, some_miss_the_barrier, some_miss_the_shuffle};
  LAUNCH(kernels[number], 1, 64, shared, nullptr, out);
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}
"""


@needs_compiler
def test_mistakes_of_kernels_are_found(tmp_path: Path) -> None:
    (tmp_path / "mistakes.cpp").write_text(MISTAKES)
    library = build_emulation(tmp_path / "mistakes.cpp", tmp_path)
    library.run.restype = ctypes.c_char_p

    def run(number: int, shared: int = 256) -> tuple[Tensor, str]:
        out = torch.zeros(64)
        return out, (library.run(number, ctypes.c_void_p(out.data_ptr()), shared) or b"").decode()

    assert run(0)[0].isnan().any()
    for seed in (0, 1, 2):
        configure_emulation(library, seed)
        out, error = run(1)
        assert not error and torch.equal(out, torch.arange(63, -1, -1).float())
        assert "wait for others that do not come" in run(2)[1]
        assert "wait for others that do not come" in run(3)[1]
    assert "more shared memory" in run(1, 64 << 10)[1]
