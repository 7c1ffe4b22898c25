// The plain C interface of the CPU library: the struct that vmamba/scan_cpp.py fills and the library reads.
//
// Shapes as in vmamba/scan_reference.py, which defines the scan: B batch, D channels of a direction, L = H*W positions,
// N states of a channel, R rank of delta. All tensors are contiguous. "or null": the pointer may be null.
#pragma once

#include <stdint.h>

// Increased whenever a struct or the layout of `saved` changes; vmamba/extension.py has the same number.
#define SCAN_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

enum ScanType { SCAN_FLOAT32 = 0, SCAN_BFLOAT16 = 1, SCAN_FLOAT16 = 2 };

// Return value of the functions.
enum ScanStatus { SCAN_OK = 0, SCAN_OUT_OF_MEMORY = 1 };

// Positions of a tile. The forward pass saves the state at the start of each tile: `saved` is [B, 4, ceil(L / tile), N, D].
enum { SCAN_TILE = 32 };

// `type` is the ScanType of x, proj and their gradients; all other tensors are float32.
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
