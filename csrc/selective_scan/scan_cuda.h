// The plain C interface of the CUDA library: the struct that vmamba/scan_cuda.py fills and scan_cuda.cu reads.
//
// Shapes as in vmamba/scan_reference.py: B batch, D channels of a direction, L = H*W positions, N states of a channel,
// R rank of delta. All tensors are contiguous, on the same device, and start at a multiple of 8 bytes. "or null":
// the pointer may be null. ScanType, the values of `type`, and SCAN_ABI_VERSION, which covers this file too, are in scan.h.
#pragma once

#include "scan.h"

#define SCAN_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// D is even. G samples share a block of threads, with W warps each. A warp processes 16 positions
// and 16 channels at a time, so a tile has 16*W positions.
struct ScanCudaImages {
  int64_t device, batch, height, width, channels, rank, states, type;
  int64_t warps, samples;    // W and G; W*G <= 16, or <= 8 unless N = 1
  const void *x, *proj;      // [B, H, W, D], [B, H, W, 4, R + 2N] of `type`
  const float* dt_weight;    // [4, D, R]
  const float* A;            // [4*D, N]
  const float *D, *dt_bias;  // [4*D] or null
  float* saved;              // [B, 4, tiles, N, D], state at the start of each tile: written by forward, read by backward
  float* y;                  // [B, H, W, D], forward only
  const float* gy;           // gradient of y; from here on for backward only
  void* dx;                  // of `type`
  float* scratch;            // scan_cuda_images_scratch floats, or null
  void* ddelta;              // [4, B, L, D], bfloat16 if `type` is, otherwise float32: gradient of dt_weight @ dt + dt_bias
  float* dBC;                // [ceil(D / 16), 4, B, L, 2N]: gradients of B and C, per block of 16 channels
  float* sums;               // [ceil(B / G), 4, N + 2, D]: dA, ddt_bias and dD (direction 0 only), per group of G samples
  void* stream;
};

// Each returns null, or a message if it failed. Afterwards the device is the current one of this library's CUDA runtime.
SCAN_EXPORT const char* scan_cuda_images_forward(const struct ScanCudaImages*);
SCAN_EXPORT const char* scan_cuda_images_backward(const struct ScanCudaImages*);
SCAN_EXPORT const char* scan_cuda_unavailable(int64_t device);  // null if the device can run this library

// Number of floats that backward needs as `scratch`.
SCAN_EXPORT int64_t scan_cuda_images_scratch(const struct ScanCudaImages*);

SCAN_EXPORT int scan_abi_version(void);

#ifdef __cplusplus
}
#endif
