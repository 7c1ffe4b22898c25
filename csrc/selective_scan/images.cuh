// The selective scan of images: cross-scan, dt projection, scan and cross-merge in one kernel, and its gradient in another.
//
// A block has 16 adjacent channels of G samples and processes the four directions one after another. Each adds to the sum
// over directions, in shared memory if it fits, so nothing is atomic and results do not vary. A direction is processed in
// tiles of 16*W positions. In a warp, 8 lanes with two channels each form a row; each of the 4 rows has 4 steps:
//
//     1. Starting from h = 0, each row computes the map h -> P h + S of its steps, and the warp composes those of its rows
//        (shuffles).
//     2. The warps exchange their maps in shared memory (the one barrier of a tile), and each thread computes the h at the
//        start of its row.
//     3. Each row repeats its steps from that h and computes y.
//
// The gradient q_l = a_l (C_l gy_l + q_{l+1}) runs backwards through the same decays a, so it has the same P and takes part in
// the same exchange. Shapes as in scan_cuda.h.
#pragma once

#include "cuda_common.cuh"
#include "scan_cuda.h"

constexpr int LANES = 8;                  // of a row
constexpr int ROWS = WARP / LANES;        // of a warp
constexpr int CHANNELS = 2 * LANES;       // of a block
constexpr int WARP_STEPS = ROWS * STEPS;  // of a warp in a tile
constexpr int MAX_THREADS = 16 * WARP;    // of a block; half as many with several states
constexpr int DT_COLUMNS = 32;            // columns of dt in shared memory at a time
static_assert(LANES == 2 * STEPS, "each lane of a row loads, and sums, one of the row's B and C");

// The sizes of ScanCudaImages and values that the host derives from them. Offsets within a sample fit in an int.
struct ImagePlan {
  int height, width, channels, rank, states, warps, samples;
  int length, columns, channel_blocks, tiles;
  unsigned divide;   // 2^32 / height + 1, to divide by height by a multiplication; 0 if L is too large for that
  bool sums_shared;  // whether the sum over directions is in shared memory
};

// Offsets in shared memory, in floats. All are multiples of 4.
struct ImageLayout {
  int weights, dt, dt_row, bc, carry, reverse, totals, entering, sums, size;
};

__host__ __device__ inline ImageLayout image_layout(const ImagePlan& plan, int states, bool backward) {
  const int warps = plan.warps * plan.samples;
  ImageLayout at{};
  at.dt_row = 4 * ((plan.rank < DT_COLUMNS ? plan.rank : DT_COLUMNS) | 1);  // 4 times odd: rows use different banks
  at.weights = 0;                                 // [R, 16]
  at.dt = at.weights + plan.rank * CHANNELS;      // [warps, ROWS, columns, STEPS]
  at.bc = at.dt + warps * ROWS * at.dt_row;       // [warps, ROWS, 2, STEPS]
  at.carry = at.bc + warps * WARP;                // [2, warps, LANES, 4]
  at.reverse = at.carry + 2 * warps * LANES * 4;  // backward: [2, warps, LANES, 2]
  at.totals = at.reverse;                         // backward: [warps, N + 2, 16]
  at.entering = at.reverse;                       // backward: [2, G, N, 16]
  at.sums = at.reverse;                           // [G, L, 16]
  if (backward) {
    at.totals = at.reverse + 2 * warps * LANES * 2;
    at.entering = at.totals + warps * (states + 2) * CHANNELS;
    at.sums = at.entering + 2 * plan.samples * states * CHANNELS;
  }
  at.size = at.sums + (plan.sums_shared ? plan.samples * plan.length * CHANNELS : 0);
  return at;
}

// The order in which one direction visits the positions of an image.
struct Path {
  int length, height, width, direction;
  unsigned divide;

  __device__ int position(int step) const {
    if (direction & 2) step = length - 1 - step;
    if (!(direction & 1)) return step;
    const int column = divide ? __umulhi(unsigned(step), divide) : step / height;
    return (step - column * height) * width + column;
  }
};

// Which part of the work a thread does.
struct Place {
  int lane, row, warp, own, group;  // own: number of the warp within its sample; group: number of the sample in the block
  int block_channel, channel;
  int64_t sample;
  bool present, exists;  // whether the sample is within the batch, the pair of channels within D

  __device__ Place(int64_t batch, const ImagePlan& plan) {
    lane = threadIdx.x % LANES;
    row = threadIdx.x / LANES % ROWS;
    warp = threadIdx.x / WARP;
    own = warp % plan.warps;
    group = warp / plan.warps;
    block_channel = blockIdx.x % plan.channel_blocks * CHANNELS;
    channel = block_channel + 2 * lane;
    sample = int64_t(blockIdx.x / plan.channel_blocks) * plan.samples + group;
    present = sample < batch;
    if (!present) sample = 0;
    exists = channel < plan.channels;
  }

  __device__ float2 load(const float* of_channels) const {
    return exists ? load_pair(of_channels + channel).unpack() : make_float2(0.f, 0.f);
  }
};

// What a thread reads of a tile; loaded while the tile before is computed.
template <typename T>
struct Fetched {
  Pair<T> x[STEPS];
  T dt[STEPS];  // column `lane` of each step
  T bc;         // of state 0: B (lanes 0 to 3) or C (lanes 4 to 7) of step lane % 4
};

// Where a thread reads its inputs in one direction.
template <typename T>
struct Source {
  const T *image, *columns;  // x from the thread's channel on; proj of the direction
  Path path;
  int channels, stride, rank, states, lane, end;  // end: number of valid steps
  bool exists;

  __device__ Source(const ScanCudaImages& args, const ImagePlan& plan, const Place& place, int k)
      : image(static_cast<const T*>(args.x) + place.sample * plan.length * plan.channels + place.channel),
        columns(static_cast<const T*>(args.proj) + (place.sample * plan.length * 4 + k) * plan.columns),
        path{plan.length, plan.height, plan.width, k, plan.divide},
        channels(plan.channels),
        stride(4 * plan.columns),
        rank(plan.rank),
        states(plan.states),
        lane(place.lane),
        end(place.present ? plan.length : 0),
        exists(place.exists) {}

  __device__ Fetched<T> fetch(int step) const {
    Fetched<T> next{};
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      if (step + t >= end) continue;
      const int position = path.position(step + t);
      if (exists) next.x[t] = load_pair(image + position * channels);
      if (lane < rank) next.dt[t] = columns[position * stride + lane];
    }
    next.bc = fetch_bc(step, 0);
    return next;
  }

  __device__ T fetch_bc(int step, int n) const {
    step += lane % STEPS;
    if (step >= end) return T{};
    return columns[path.position(step) * stride + rank + (lane < STEPS ? 0 : states) + n];
  }

  // delta of the thread's steps and channels before softplus: bias + dt_weight @ dt.
  __device__ void project(float (&delta)[STEPS][2], float2 bias, const Fetched<T>& now, int step, float* dt_row,
                          const float* weights) const {
#pragma unroll
    for (int t = 0; t < STEPS; ++t) delta[t][0] = bias.x, delta[t][1] = bias.y;
    for (int start = 0; start < rank; start += DT_COLUMNS) {
      const int stop = min(rank, start + DT_COLUMNS);
      __syncwarp();
#pragma unroll 1
      for (int r = start + lane; r < stop; r += LANES) {
        float d[STEPS];
#pragma unroll
        for (int t = 0; t < STEPS; ++t) {
          T value = now.dt[t];
          if (r >= LANES && step + t < end) value = columns[path.position(step + t) * stride + r];
          d[t] = to_float(value);
        }
        *reinterpret_cast<float4*>(dt_row + 4 * (r - start)) = make_float4(d[0], d[1], d[2], d[3]);
      }
      __syncwarp();
#pragma unroll 2
      for (int r = start; r < stop; ++r) {
        const float4 d = *reinterpret_cast<const float4*>(dt_row + 4 * (r - start));
        const float2 w = load_pair(weights + r * CHANNELS + 2 * lane).unpack();
        delta[0][0] = fmaf(w.x, d.x, delta[0][0]), delta[0][1] = fmaf(w.y, d.x, delta[0][1]);
        delta[1][0] = fmaf(w.x, d.y, delta[1][0]), delta[1][1] = fmaf(w.y, d.y, delta[1][1]);
        delta[2][0] = fmaf(w.x, d.z, delta[2][0]), delta[2][1] = fmaf(w.y, d.z, delta[2][1]);
        delta[3][0] = fmaf(w.x, d.w, delta[3][0]), delta[3][1] = fmaf(w.y, d.w, delta[3][1]);
      }
    }
  }
};

// Gives every lane of a row B and C of the row's steps, of which each lane has loaded one value. There must be a barrier of the
// block between two calls.
template <typename T>
__device__ inline void exchange_bc(T mine, float* bc_row, int lane, float (&B)[STEPS], float (&C)[STEPS]) {
  bc_row[lane] = to_float(mine);
  __syncwarp();
  const float4 b = *reinterpret_cast<const float4*>(bc_row);
  const float4 c = *reinterpret_cast<const float4*>(bc_row + STEPS);
  B[0] = b.x, B[1] = b.y, B[2] = b.z, B[3] = b.w;
  C[0] = c.x, C[1] = c.y, C[2] = c.z, C[3] = c.w;
}

// Maps h -> P h + S of a pair of channels.
struct Maps {
  float P[2], S[2];
};

// Composes the maps of the row and of the warp's rows before it (DOWN: after it); `others` is the same without the row itself.
template <bool DOWN>
__device__ inline void scan_rows(Maps& maps, Maps& others, int row) {
#pragma unroll
  for (int away = 1; away < ROWS; away *= 2) {
    const bool there = DOWN ? row + away < ROWS : row >= away;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const float P = DOWN ? __shfl_down_sync(ALL, maps.P[v], away * LANES) : __shfl_up_sync(ALL, maps.P[v], away * LANES);
      const float S = DOWN ? __shfl_down_sync(ALL, maps.S[v], away * LANES) : __shfl_up_sync(ALL, maps.S[v], away * LANES);
      if (there) {
        maps.S[v] = fmaf(maps.P[v], S, maps.S[v]);
        maps.P[v] = decay_product(maps.P[v], P);
      }
    }
  }
  const bool there = DOWN ? row + 1 < ROWS : row > 0;
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const float P = DOWN ? __shfl_down_sync(ALL, maps.P[v], LANES) : __shfl_up_sync(ALL, maps.P[v], LANES);
    const float S = DOWN ? __shfl_down_sync(ALL, maps.S[v], LANES) : __shfl_up_sync(ALL, maps.S[v], LANES);
    others.P[v] = there ? P : 1.f;
    others.S[v] = there ? S : 0.f;
  }
}

// Loads the block's dt_weight of one direction, [R, 16]. No thread still uses the previous direction's: there was a barrier in
// its last tile. The barrier here also separates the sums of two directions.
__device__ inline void load_weights(float* weights, const float* dt_weight, const ImagePlan& plan, int direction,
                                    int block_channel) {
  const int rank = plan.rank;
  for (int i = threadIdx.x; i < rank * CHANNELS; i += blockDim.x) {
    const int channel = block_channel + i / rank;
    const int64_t at = (int64_t(direction) * plan.channels + channel) * rank + i % rank;
    weights[i % rank * CHANNELS + i / rank] = channel < plan.channels ? dt_weight[at] : 0.f;
  }
  __syncthreads();
}

// The sum over directions. Within a direction, one thread writes each position and pair of channels; there are barriers between
// directions.
struct DirectionSum {
  float* at;  // position 0 and the thread's channel
  int stride;

  __device__ void add(int position, float2 value, bool start) const {
    float* to = at + position * stride;
    if (!start) {
      const float2 before = load_pair(to).unpack();
      value.x += before.x, value.y += before.y;
    }
    store_pair(to, value);
  }
};

__device__ inline DirectionSum direction_sum(float* shared, float* global, const ImagePlan& plan, const Place& place) {
  if (plan.sums_shared) return {shared + place.group * plan.length * CHANNELS + 2 * place.lane, CHANNELS};
  return {global + place.sample * plan.length * plan.channels + place.channel, plan.channels};
}

// Copies the sum over directions to the output. The rows of a sample's warps take its positions in turn.
template <typename T>
__device__ inline void write_sum(const DirectionSum& sum, T* out, const ImagePlan& plan, const Place& place) {
  __syncthreads();
  out += place.sample * plan.length * plan.channels + place.channel;
  const int end = place.present && place.exists ? plan.length : 0;
  for (int p = place.own * ROWS + place.row; p < end; p += plan.warps * ROWS)
    store_pair(out + p * plan.channels, load_pair(sum.at + p * sum.stride).unpack());
}

// D summed over directions: each adds D u of the same u.
__device__ inline float2 skip(const float* D, const ImagePlan& plan, const Place& place) {
  float2 sum = make_float2(0.f, 0.f);
  for (int k = 0; D && k < 4; ++k) {
    const float2 d = place.load(D + k * plan.channels);
    sum.x += d.x, sum.y += d.y;
  }
  return sum;
}

// A of one state, times a factor.
__device__ inline float2 load_A(const float* A, const ImagePlan& plan, const Place& place, int direction, int n, float factor) {
  A += (int64_t(direction) * plan.channels + place.channel) * plan.states + n;
  return place.exists ? make_float2(factor * A[0], factor * A[plan.states]) : make_float2(0.f, 0.f);
}
