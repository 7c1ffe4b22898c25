// The plain C interface of the compiled selective scans: what Python (vmamba/scan_cpp.py) fills and a library reads.
//
// Letters as in vmamba/scan_torch.py: B batch, K directions, D channels of a direction, L = H*W positions, N states of a
// channel, R rank of delta. All tensors are contiguous. Pointers that may be null are marked "or null".
#pragma once

#include <stdint.h>

// Raised whenever a struct, a function or the layout of `states` changes; vmamba/extension.py has the same number.
#define SCAN_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

enum ScanType { SCAN_FLOAT32 = 0, SCAN_BFLOAT16 = 1, SCAN_FLOAT16 = 2 };

// What the functions return.
enum ScanStatus { SCAN_OK = 0, SCAN_OUT_OF_MEMORY = 1 };

// The forward pass keeps the state that enters each tile of so many positions: `states` is [B, K, ceil(L / tile), N, D].
enum { SCAN_TILE = 32 };

// Sequences. `type` is that of u, delta, B, C and of their gradients; everything else is float32.
struct ScanArgs {
  int64_t batch, directions, channels, length, states, type, softplus, threads;
  const void *u, *delta;        // [B, K*D, L]
  const float* A;               // [K*D, N]
  const void *B, *C;            // [B, K, N, L]
  const float *D, *delta_bias;  // [K*D] or null
  float *y, *saved;             // [B, K*D, L], [B, K, tiles, N, D]: written by forward, `saved` read by backward
  const float* gy;              // backward only, like everything below
  void *du, *ddelta, *dB, *dC;
  float *dA, *dD, *ddelta_bias;  // the last two null where D or delta_bias is
};

// Images, in four directions (K = 4). `type` is that of x, proj and of their gradients; everything else is float32.
struct Scan2dArgs {
  int64_t batch, height, width, channels, rank, states, type, threads;
  const void *x, *proj;      // [B, H, W, D], [B, H, W, 4, R + 2N]: dt, B, C of each direction
  const float* dt_weight;    // [4, D, R]
  const float* A;            // [4*D, N]
  const float *D, *dt_bias;  // [4*D] or null
  float *y, *saved;          // [B, H, W, D], [B, 4, tiles, N, D]
  const float* gy;           // backward only, like everything below
  void *dx, *dproj;
  float *ddt_weight, *dA, *dD, *ddt_bias;  // the last two null where D or dt_bias is
};

#ifdef __cplusplus
}
#endif
