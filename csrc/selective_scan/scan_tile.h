// One tile of a scan: up to TILE positions of one direction, for a block of BLOCK channels. Nearly all time is spent here.
//
// Units: delta is stored divided by ln 2, so that exp(delta A) = 2^(delta A), and u multiplied by ln 2, so that their product
// is still delta * u. Weights and bias are multiplied by log2(e) accordingly when they are packed, once per block of channels.
//
// A tile is processed in passes over arrays that stay in the first-level cache: matrix product, softplus, exp, recurrence.
// Each pass has enough independent operations to keep the arithmetic units busy; a single loop that does everything for a
// position would wait for its own results.
#pragma once

#include "scan.h"
#include "scan_math.h"

namespace {

constexpr int TILE = SCAN_TILE;
constexpr int VECS = LANES < 8 ? 4 : 2;  // vectors per row
constexpr int BLOCK = VECS * LANES;      // channels: 16, with AVX-512 32
constexpr int ROWS = 8 / VECS;           // rows of a matrix product in registers: 8 sums hide the latency of additions

static_assert(TILE % LANES == 0 && TILE % ROWS == 0 && TILE % 8 == 0, "passes work on groups of rows");

typedef float Rows[TILE][BLOCK];

// Parameters of the block's channels in one direction.
struct Parameters {
  float* weight;             // [R, BLOCK], times log2(e)
  float* weight_transposed;  // [BLOCK, R rounded up to LANES], also scaled; only for backward
  float* bias;               // [BLOCK], times log2(e)
  float* A;                  // [N, BLOCK]
};

// Their gradients, in the units of the tile. Shapes as above.
struct Gradients {
  float *weight, *bias, *A;
};

// Where the positions of the tile lie in memory. After `count`, up to a multiple of ROWS, `proj` repeats the last one.
struct Tile {
  int count;
  int64_t at[TILE];         // offset of a position's row in u, y, gy, du
  const float* proj[TILE];  // dt [R], B [N], C [N] of a position
  float* dproj[TILE];       // their gradients are added here; after those of dt, up to LANES - 1 zeros are added too
};

// Results that one pass leaves for the next.
struct Work {
  alignas(64) Rows delta;                // before softplus, then after
  alignas(64) Rows slope;                // of softplus
  alignas(64) Rows a;                    // exp(delta A) of one state
  alignas(64) Rows ddelta;               // gradient of delta before softplus
  alignas(64) float h[TILE + 1][BLOCK];  // state before each position, and after the last
  Vec dB[TILE], dC[TILE];                // partial sums over channels
};

// delta = weight^T dt + bias
inline void project(const Tile& tile, const Parameters& p, int64_t rank, Work& work) {
  for (int t = 0; t < tile.count; t += ROWS) {
    Vec sum[ROWS][VECS];
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECS; ++v) sum[i][v] = load(p.bias + v * LANES);
    for (int64_t r = 0; r < rank; ++r)
      for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECS; ++v) sum[i][v] += tile.proj[t + i][r] * load(p.weight + r * BLOCK + v * LANES);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECS; ++v) store(work.delta[t + i] + v * LANES, sum[i][v]);
  }
}

template <bool SLOPE>
inline void softplus(int count, Work& work) {
  float *const delta = &work.delta[0][0], *const slope = &work.slope[0][0];
  for (int i = 0; i < count * BLOCK; i += 4 * LANES) {
    const Quad x = load4(delta + i);
    Quad e;
    store4(delta + i, softplus2(x, e));
    if (SLOPE) store4(slope + i, softplus2_slope(x, e));
  }
}

// a = exp(delta A), A [BLOCK]
inline void decay(int count, const float* A, Work& work) {
  const Quad A4 = {load(A), load(A + LANES), load(A + 2 % VECS * LANES), load(A + 3 % VECS * LANES)};
  for (int i = 0; i < count * BLOCK; i += 4 * LANES) store4(work.a[0] + i, exp2(load4(work.delta[0] + i) * A4));
}

// h = a h + delta B u;  y += C h.  `state` [N, BLOCK] is that before the tile and becomes that after it.
inline void scan_forward(const Tile& tile, const Parameters& p, int64_t rank, int64_t states, const float* u, float* y,
                         float* state, Work& work) {
  for (int64_t n = 0; n < states; ++n) {
    decay(tile.count, p.A + n * BLOCK, work);
    Vec h[VECS];
    for (int v = 0; v < VECS; ++v) h[v] = load(state + n * BLOCK + v * LANES);
    for (int t = 0; t < tile.count; ++t) {
      const float B = tile.proj[t][rank + n], C = tile.proj[t][rank + states + n];
      const float *const ut = u + tile.at[t], *const a = work.a[t], *const delta = work.delta[t];
      float* const yt = y + tile.at[t];
      for (int v = 0; v < BLOCK; v += LANES) {
        h[v / LANES] = load(a + v) * h[v / LANES] + load(delta + v) * load(ut + v) * B;
        store(yt + v, load(yt + v) + C * h[v / LANES]);
      }
    }
    for (int v = 0; v < VECS; ++v) store(state + n * BLOCK + v * LANES, h[v]);
  }
}

// Repeats the forward pass of one state, from `state` [BLOCK] at the start of the tile: fills work.a and work.h.
inline void recompute(const Tile& tile, const float* A, int64_t b, const float* u, const float* state, Work& work) {
  decay(tile.count, A, work);
  Vec h[VECS];
  for (int v = 0; v < VECS; ++v) store(work.h[0] + v * LANES, h[v] = load(state + v * LANES));
  for (int t = 0; t < tile.count; ++t) {
    const float B = tile.proj[t][b];
    const float *const ut = u + tile.at[t], *const a = work.a[t], *const delta = work.delta[t];
    for (int v = 0; v < BLOCK; v += LANES) {
      h[v / LANES] = load(a + v) * h[v / LANES] + load(delta + v) * load(ut + v) * B;
      store(work.h[t + 1] + v, h[v / LANES]);
    }
  }
}

// Gradients of one state, in reverse: gh = C gy + (a gh of the next position), and from it all others.
// `carry` [BLOCK] is a gh of the position after the tile and becomes a gh of the first position of the tile.
template <bool FIRST>
inline void reverse(const Tile& tile, const float* A, int64_t b, int64_t c, const float* u, const float* gy, float* du,
                    float* carry, float* dA, float* dbias, Work& work) {
  Vec gh[VECS], a_next[VECS], sum_A[VECS], sum_bias[VECS];
  for (int v = 0; v < VECS; ++v) {
    gh[v] = load(carry + v * LANES);
    a_next[v] = broadcast(1.f);
    sum_A[v] = load(dA + v * LANES);
    sum_bias[v] = load(dbias + v * LANES);
  }
  for (int t = tile.count - 1; t >= 0; --t) {
    const float B = tile.proj[t][b], C = tile.proj[t][c];
    const float *const ut = u + tile.at[t], *const gt = gy + tile.at[t];
    float* const dut = du + tile.at[t];
    Vec dB = {}, dC = {};
    for (int v = 0; v < VECS; ++v) {
      const int at = v * LANES;
      const Vec x = load(ut + at), g = load(gt + at), a = load(work.a[t] + at), decayed = a * load(work.h[t] + at);
      gh[v] = a_next[v] * gh[v] + C * g;
      a_next[v] = a;
      const Vec gdelta = gh[v] * load(work.delta[t] + at);
      dB += gdelta * x;
      dC += g * load(work.h[t + 1] + at);
      sum_A[v] += gdelta * decayed;
      store(dut + at, load(dut + at) + gdelta * B);
      const Vec ddelta = gh[v] * load(work.slope[t] + at) * (load(A + at) * LN2 * decayed + B * x);
      sum_bias[v] += ddelta;
      store(work.ddelta[t] + at, FIRST ? ddelta : load(work.ddelta[t] + at) + ddelta);
    }
    work.dB[t] = dB;
    work.dC[t] = dC;
  }
  for (int v = 0; v < VECS; ++v) {
    store(carry + v * LANES, a_next[v] * gh[v]);
    store(dA + v * LANES, sum_A[v]);
    store(dbias + v * LANES, sum_bias[v]);
  }
}

// dproj[column] of each position += the sum of its lanes
inline void add_lanes(const Tile& tile, int64_t column, Vec* lanes) {
  for (int t = 0; t < tile.count; t += LANES) {
    alignas(64) float sums[LANES];
    store(sums, lane_sums(lanes + t));
    for (int i = 0; i < LANES && t + i < tile.count; ++i) tile.dproj[t + i][column] += sums[i];
  }
}

// `state` [N, BLOCK] is that before the tile; `carry` [N, BLOCK] as in `reverse`.
inline void scan_backward(const Tile& tile, const Parameters& p, int64_t rank, int64_t states, const float* u, const float* gy,
                          float* du, const float* state, float* carry, const Gradients& grad, Work& work) {
  for (int64_t n = 0; n < states; ++n) {
    const int64_t b = rank + n, c = b + states, at = n * BLOCK;
    recompute(tile, p.A + at, b, u, state + at, work);
    const auto pass = n == 0 ? reverse<true> : reverse<false>;
    pass(tile, p.A + at, b, c, u, gy, du, carry + at, grad.A + at, grad.bias, work);
    add_lanes(tile, b, work.dB);
    add_lanes(tile, c, work.dC);
  }
}

// dweight[r .. r + COUNT] += sum over positions of dt[r] ddelta
template <int COUNT>
inline void weight_backward(const Tile& tile, int64_t r, const Work& work, float* dweight) {
  Vec sum[COUNT][VECS];
  for (int i = 0; i < COUNT; ++i)
    for (int v = 0; v < VECS; ++v) sum[i][v] = load(dweight + (r + i) * BLOCK + v * LANES);
  for (int t = 0; t < tile.count; ++t)
    for (int i = 0; i < COUNT; ++i)
      for (int v = 0; v < VECS; ++v) sum[i][v] += tile.proj[t][r + i] * load(work.ddelta[t] + v * LANES);
  for (int i = 0; i < COUNT; ++i)
    for (int v = 0; v < VECS; ++v) store(dweight + (r + i) * BLOCK + v * LANES, sum[i][v]);
}

// ddt[r .. r + WIDE * LANES] of COUNT positions += sum over channels of ddelta weight
template <int COUNT, int WIDE>
inline void dt_backward(const Tile& tile, int t, int64_t r, int64_t stride, const float* weight_transposed, const Work& work) {
  Vec sum[COUNT][WIDE] = {};
  for (int channel = 0; channel < BLOCK; ++channel)
    for (int i = 0; i < COUNT; ++i)
      for (int v = 0; v < WIDE; ++v)
        sum[i][v] += work.ddelta[t + i][channel] * load(weight_transposed + channel * stride + r + v * LANES);
  for (int i = 0; i < COUNT && t + i < tile.count; ++i)
    for (int v = 0; v < WIDE; ++v) {
      float* to = tile.dproj[t + i] + r + v * LANES;
      store(to, load(to) + sum[i][v]);
    }
}

inline void project_backward(const Tile& tile, const Parameters& p, int64_t rank, const Work& work, const Gradients& grad) {
  int64_t r = 0;
  for (; r + ROWS <= rank; r += ROWS) weight_backward<ROWS>(tile, r, work, grad.weight);
  for (; r + 2 <= rank; r += 2) weight_backward<2>(tile, r, work, grad.weight);
  for (; r < rank; ++r) weight_backward<1>(tile, r, work, grad.weight);

  const int64_t stride = (rank + LANES - 1) / LANES * LANES;
  for (r = 0; r + 2 * LANES <= stride; r += 2 * LANES)
    for (int t = 0; t < tile.count; t += 4) dt_backward<4, 2>(tile, t, r, stride, p.weight_transposed, work);
  if (r < stride)
    for (int t = 0; t < tile.count; t += 8) dt_backward<8, 1>(tile, t, r, stride, p.weight_transposed, work);
}

}  // namespace
