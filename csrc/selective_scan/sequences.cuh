// The selective scan of sequences, whose positions are contiguous: S lanes of a warp share a channel, so that a scan needs
// shuffles only. A block has 256 / S channels of one direction and sample. Shapes as in scan_cuda.h, method as in images.cuh.
#pragma once

#include "cuda_common.cuh"
#include "scan_cuda.h"

constexpr int SEQUENCE_THREADS = 256;

// Which part of the work a thread does, and where its channel is in memory.
struct Strand {
  int lane, slot, lanes, slots;    // slot: number of the channel within the block
  int64_t group, stream, channel;  // stream: sample and direction; channel: row of A, D, delta_bias
  int64_t line;                    // row of u, delta and y
  int tiles, tile;                 // tile: positions of a tile
  bool present;

  __device__ explicit Strand(const ScanCudaSequences& args) {
    lanes = int(args.lanes);
    slots = SEQUENCE_THREADS / lanes;
    lane = threadIdx.x % lanes;
    slot = threadIdx.x / lanes;
    const int64_t groups = (args.channels + slots - 1) / slots;
    group = blockIdx.x % groups;
    stream = blockIdx.x / groups;
    const int64_t own = group * slots + slot;
    present = own < args.channels;
    channel = stream % args.directions * args.channels + (present ? own : 0);
    line = stream / args.directions * args.directions * args.channels + channel;
    tile = lanes * STEPS;
    tiles = int((args.length + tile - 1) / tile);
  }
};

template <typename T>
__device__ inline void load_steps(float (&to)[STEPS], const T* from, int step, int end) {
#pragma unroll
  for (int t = 0; t < STEPS; ++t) to[t] = step + t < end ? to_float(from[step + t]) : 0.f;
}

template <typename T>
__device__ inline void store_steps(T* to, const float (&from)[STEPS], int step, int end) {
#pragma unroll
  for (int t = 0; t < STEPS; ++t)
    if (step + t < end) from_float(from[t], to[step + t]);
}

// delta = softplus(delta + bias), or delta + bias without softplus, and its derivative; 0 after the end, where h stays.
__device__ inline void activate(float (&delta)[STEPS], float (&slope)[STEPS], float bias, bool with_softplus, int step,
                                int end) {
#pragma unroll
  for (int t = 0; t < STEPS; ++t) {
    delta[t] += bias;
    slope[t] = 1.f;
    if (with_softplus) delta[t] = softplus(delta[t], slope[t]);
    if (step + t >= end) delta[t] = 0.f;
  }
}

// Composes the maps h -> P h + S of the lane and of the lanes before it (DOWN: after it) in its channel.
template <bool DOWN>
__device__ inline void scan_lanes(float& P, float& S, int lane, int lanes) {
  for (int away = 1; away < lanes; away *= 2) {
    const float other_P = DOWN ? __shfl_down_sync(ALL, P, away, lanes) : __shfl_up_sync(ALL, P, away, lanes);
    const float other_S = DOWN ? __shfl_down_sync(ALL, S, away, lanes) : __shfl_up_sync(ALL, S, away, lanes);
    if (DOWN ? lane + away < lanes : lane >= away) {
      S = fmaf(P, other_S, S);
      P = decay_product(P, other_P);
    }
  }
}

// Applies the composed map of the neighbouring lane to `start`: the state at the start of this lane.
template <bool DOWN>
__device__ inline float enter(float P, float S, float start, int lane, int lanes) {
  const float other_P = DOWN ? __shfl_down_sync(ALL, P, 1, lanes) : __shfl_up_sync(ALL, P, 1, lanes);
  const float other_S = DOWN ? __shfl_down_sync(ALL, S, 1, lanes) : __shfl_up_sync(ALL, S, 1, lanes);
  return (DOWN ? lane + 1 < lanes : lane > 0) ? fmaf(other_P, start, other_S) : start;
}

__device__ inline float sum_lanes(float value, int lanes) {
  for (int away = lanes / 2; away > 0; away /= 2) value += __shfl_xor_sync(ALL, value, away, lanes);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(SEQUENCE_THREADS) sequences_forward(const ScanCudaSequences args) {
  const Strand strand(args);
  const int lane = strand.lane, lanes = strand.lanes, states = int(args.states);
  const int end = strand.present ? int(args.length) : 0;
  const T* const u_line = static_cast<const T*>(args.u) + strand.line * args.length;
  const T* const delta_line = static_cast<const T*>(args.delta) + strand.line * args.length;
  const float bias = args.delta_bias ? args.delta_bias[strand.channel] : 0.f;
  const float D = args.D ? args.D[strand.channel] : 0.f;

  for (int tile = 0; tile < strand.tiles; ++tile) {
    const int step = tile * strand.tile + lane * STEPS;
    float u[STEPS], delta[STEPS], slope[STEPS], y[STEPS];
    load_steps(u, u_line, step, end);
    load_steps(delta, delta_line, step, end);
    activate(delta, slope, bias, args.softplus, step, end);
#pragma unroll
    for (int t = 0; t < STEPS; ++t) y[t] = D * u[t];

    for (int n = 0; n < states; ++n) {
      float B[STEPS], C[STEPS], a[STEPS];
      load_steps(B, static_cast<const T*>(args.B) + (strand.stream * states + n) * args.length, step, end);
      load_steps(C, static_cast<const T*>(args.C) + (strand.stream * states + n) * args.length, step, end);
      const float A = args.A[strand.channel * states + n] * LOG2_E;
      float P = 1.f, S = 0.f;
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        a[t] = exp2_fast(delta[t] * A);
        S = fmaf(a[t], S, delta[t] * u[t] * B[t]);
        P = decay_product(P, a[t]);
      }
      scan_lanes<false>(P, S, lane, lanes);

      // The last lane passes the state to the next tile through `saved`, where it reads what it wrote itself.
      float* const kept = args.saved + (strand.line * strand.tiles + tile) * states + n;
      float h_tile = 0.f;
      if (lane == lanes - 1 && strand.present) {
        if (tile) h_tile = *kept;
        if (tile == 0) *kept = 0.f;
        if (tile + 1 < strand.tiles) kept[states] = fmaf(P, h_tile, S);
      }
      h_tile = __shfl_sync(ALL, h_tile, lanes - 1, lanes);
      float h = enter<false>(P, S, h_tile, lane, lanes);
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        h = fmaf(a[t], h, delta[t] * u[t] * B[t]);
        y[t] = fmaf(C[t], h, y[t]);
      }
    }
    store_steps(args.y + strand.line * args.length, y, step, end);
  }
}

template <typename T>
__global__ void __launch_bounds__(SEQUENCE_THREADS) sequences_backward(const ScanCudaSequences args) {
  SHARED_MEMORY(parts);  // dB and dC of the block's channels: [2, slot, position of the tile]
  constexpr int PART = SEQUENCE_THREADS * STEPS;
  const Strand strand(args);
  const int lane = strand.lane, lanes = strand.lanes, states = int(args.states);
  const int end = strand.present ? int(args.length) : 0;
  const int64_t line = strand.line * args.length;
  const float bias = args.delta_bias ? args.delta_bias[strand.channel] : 0.f;
  const float D = args.D ? args.D[strand.channel] : 0.f;
  const bool writes = lane == 0 && strand.present;
  float dD = 0.f, dbias = 0.f;

  for (int tile = strand.tiles - 1; tile >= 0; --tile) {
    const int step = tile * strand.tile + lane * STEPS;
    const bool start = tile == strand.tiles - 1;
    float u[STEPS], delta[STEPS], slope[STEPS], gy[STEPS], du[STEPS], ddelta[STEPS] = {};
    load_steps(u, static_cast<const T*>(args.u) + line, step, end);
    load_steps(delta, static_cast<const T*>(args.delta) + line, step, end);
    load_steps(gy, args.gy + line, step, end);
    activate(delta, slope, bias, args.softplus, step, end);
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      du[t] = D * gy[t];
      dD = fmaf(gy[t], u[t], dD);
    }

    for (int n = 0; n < states; ++n) {
      float B[STEPS], C[STEPS], a[STEPS], decayed[STEPS];
      load_steps(B, static_cast<const T*>(args.B) + (strand.stream * states + n) * args.length, step, end);
      load_steps(C, static_cast<const T*>(args.C) + (strand.stream * states + n) * args.length, step, end);
      const float A = args.A[strand.channel * states + n];
      float P = 1.f, S = 0.f, Q = 0.f;  // h -> P h + S forwards, q -> P q + Q backwards
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        a[t] = exp2_fast(delta[t] * A * LOG2_E);
        S = fmaf(a[t], S, delta[t] * u[t] * B[t]);
        P = decay_product(P, a[t]);
      }
#pragma unroll
      for (int t = STEPS - 1; t >= 0; --t) Q = a[t] * fmaf(C[t], gy[t], Q);
      float later_P = P;
      scan_lanes<false>(P, S, lane, lanes);
      scan_lanes<true>(later_P, Q, lane, lanes);

      // Lane 0 passes q to the tile before through `carry`, where it reads what it wrote itself.
      const int64_t at = strand.line * states + n;
      float q_tile = 0.f;
      if (writes) {
        if (!start) q_tile = args.carry[at];
        args.carry[at] = fmaf(later_P, q_tile, Q);
      }
      q_tile = __shfl_sync(ALL, q_tile, 0, lanes);
      float q = enter<true>(later_P, Q, q_tile, lane, lanes);
      const float h_tile = strand.present ? args.saved[(strand.line * strand.tiles + tile) * states + n] : 0.f;
      float h = enter<false>(P, S, h_tile, lane, lanes);

      float dA = 0.f;
      float* const dB = parts + strand.slot * strand.tile + lane * STEPS;
      float* const dC = dB + PART;
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        decayed[t] = a[t] * h;
        h = fmaf(delta[t] * u[t], B[t], decayed[t]);
        dC[t] = gy[t] * h;
      }
#pragma unroll
      for (int t = STEPS - 1; t >= 0; --t) {
        const float g = fmaf(C[t], gy[t], q);  // dL/dh
        const float g_decayed = g * decayed[t];
        q = a[t] * g;
        dB[t] = g * delta[t] * u[t];
        du[t] = fmaf(g * B[t], delta[t], du[t]);
        ddelta[t] = fmaf(g * B[t], u[t], fmaf(g_decayed, A, ddelta[t]));
        dA = fmaf(g_decayed, delta[t], dA);
      }
      dA = sum_lanes(dA, lanes);
      if (writes) args.dA[at] = start ? dA : args.dA[at] + dA;

      __syncthreads();
      const int64_t streams = args.batch * args.directions;
      for (int i = threadIdx.x; i < 2 * strand.tile; i += SEQUENCE_THREADS) {
        const int position = i % strand.tile, which = i / strand.tile;
        float value = 0.f;
        for (int slot = 0; slot < strand.slots; ++slot) value += parts[which * PART + slot * strand.tile + position];
        const int64_t row = (strand.group * streams + strand.stream) * states + n, column = tile * strand.tile + position;
        if (column < args.length) (which ? args.dC : args.dB)[row * args.length + column] = value;
      }
      __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      ddelta[t] *= slope[t];
      dbias += step + t < end ? ddelta[t] : 0.f;
    }
    store_steps(static_cast<T*>(args.du) + line, du, step, end);
    store_steps(static_cast<T*>(args.ddelta) + line, ddelta, step, end);
  }
  dD = sum_lanes(dD, lanes);
  dbias = sum_lanes(dbias, lanes);
  if (writes) args.dD[strand.line] = dD, args.dbias[strand.line] = dbias;
}
