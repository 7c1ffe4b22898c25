// The plain C interface of the CUDA library: structs that vmamba/scan_cuda.py fills and scan_cuda.cu reads.
//
// Shapes as in vmamba/scan_reference.py: B batch, K directions, D channels of a direction, L = H*W positions, N states of a
// channel, R rank of delta. All tensors are contiguous, on the same device, and start at a multiple of 8 bytes. "or null":
// the pointer may be null. ScanType, the values of `type`, and SCAN_ABI_VERSION, which covers this file too, are in scan.h.
#pragma once

#include "scan.h"

#define SCAN_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Images, in four directions; D is even. G samples share a block of threads, with W warps each. A warp processes 16 positions
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

// Sequences. S lanes of a warp share a channel, each with 4 consecutive positions: a tile has 4*S positions, and a block has
// 256 / S channels.
struct ScanCudaSequences {
  int64_t device, batch, directions, channels, length, states, type, softplus;
  int64_t lanes;                // S: 1, 2, 4, 8, 16 or 32
  const void *u, *delta;        // [B, K*D, L] of `type`
  const float* A;               // [K*D, N]
  const void *B, *C;            // [B, K, N, L] of `type`
  const float *D, *delta_bias;  // [K*D] or null
  float* saved;                 // [B, K*D, tiles, N], state at the start of each tile: written by forward, read by backward
  float* y;                     // [B, K*D, L], forward only
  const float* gy;              // gradient of y; from here on for backward only
  void *du, *ddelta;            // of `type`
  float *dB, *dC;               // [ceil(D / (256 / S)), B, K, N, L], per block of 256 / S channels
  float *dA, *dD, *dbias;       // [B, K*D, N], [B, K*D], [B, K*D]
  float* carry;                 // [B, K*D, N]: memory for the gradient that a tile passes on
  void* stream;
};

// Each returns null, or a message if it failed. Afterwards the device is the current one of this library's CUDA runtime.
SCAN_EXPORT const char* scan_cuda_images_forward(const struct ScanCudaImages*);
SCAN_EXPORT const char* scan_cuda_images_backward(const struct ScanCudaImages*);
SCAN_EXPORT const char* scan_cuda_sequences_forward(const struct ScanCudaSequences*);
SCAN_EXPORT const char* scan_cuda_sequences_backward(const struct ScanCudaSequences*);
SCAN_EXPORT const char* scan_cuda_unavailable(int64_t device);  // null if the device can run this library

// Number of floats that backward needs as `scratch`.
SCAN_EXPORT int64_t scan_cuda_images_scratch(const struct ScanCudaImages*);

SCAN_EXPORT int scan_abi_version(void);

#ifdef __cplusplus
}
#endif
