// The plain C interface of the CPU library: structs that vmamba/scan_cpp.py fills and the library reads.
//
// Shapes as in vmamba/scan_reference.py, which defines the operators: B batch, K directions, D channels of a direction,
// L = H*W positions, N states of a channel, R rank of delta. All tensors are contiguous. "or null": the pointer may be null.
#pragma once

#include <stdint.h>

// Increased whenever a struct, a function or the layout of `saved` changes; vmamba/extension.py has the same number.
#define SCAN_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

enum ScanType { SCAN_FLOAT32 = 0, SCAN_BFLOAT16 = 1, SCAN_FLOAT16 = 2 };

// Return value of the functions.
enum ScanStatus { SCAN_OK = 0, SCAN_OUT_OF_MEMORY = 1 };

// Positions of a tile. The forward pass saves the state at the start of each tile: `saved` is [B, K, ceil(L / tile), N, D].
enum { SCAN_TILE = 32 };

// Sequences. `type` is the ScanType of u, delta, B, C and their gradients; all other tensors are float32.
struct ScanArgs {
  int64_t batch, directions, channels, length, states, type, softplus, threads;
  const void *u, *delta;        // [B, K*D, L]
  const float* A;               // [K*D, N]
  const void *B, *C;            // [B, K, N, L]
  const float *D, *delta_bias;  // [K*D] or null
  float *y, *saved;             // [B, K*D, L], [B, K, tiles, N, D]: outputs of forward; backward reads `saved`
  const float* gy;              // gradient of y; from here on for backward only
  void *du, *ddelta, *dB, *dC;
  float *dA, *dD, *ddelta_bias;  // the last two are null if D or delta_bias is
};

// Images, in four directions (K = 4). `type` is the ScanType of x, proj and their gradients; all other tensors are float32.
struct Scan2dArgs {
  int64_t batch, height, width, channels, rank, states, type, threads;
  const void *x, *proj;      // [B, H, W, D], [B, H, W, 4, R + 2N]: dt, B and C of each direction
  const float* dt_weight;    // [4, D, R]
  const float* A;            // [4*D, N]
  const float *D, *dt_bias;  // [4*D] or null
  float *y, *saved;          // [B, H, W, D], [B, 4, tiles, N, D]
  const float* gy;           // gradient of y; from here on for backward only
  void *dx, *dproj;
  float *ddt_weight, *dA, *dD, *ddt_bias;  // the last two are null if D or dt_bias is
};

#ifdef __cplusplus
}
#endif
