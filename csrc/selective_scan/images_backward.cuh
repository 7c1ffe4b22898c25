// Backward kernel of images: see images.cuh. It recomputes decays and states, from the saved state at the start of each tile.
#pragma once

#include "images.cuh"

template <typename T>
struct DeltaGradient {
  using Type = float;
};
template <>
struct DeltaGradient<Bfloat16> {  // has the range of float32; float16 could overflow
  using Type = Bfloat16;
};

// Sums eight values over the eight lanes of a row: lane i gets the sum of value i.
__device__ inline float sum_over_row(float (&values)[LANES], int lane) {
#pragma unroll
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = lane & half;
      const float sent = upper ? values[i] : values[i + half];
      values[i] = (upper ? values[i + half] : values[i]) + __shfl_xor_sync(ALL, sent, half);
    }
  return values[0];
}

// Adds the values of a warp's rows for the thread's pair of channels to the warp's totals in shared memory.
__device__ inline void add_total(float* totals, float (&values)[2], int row) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
#pragma unroll
    for (int away = LANES; away < WARP; away *= 2) values[v] += __shfl_xor_sync(ALL, values[v], away);
    if (row == 0) totals[v] += values[v];
    values[v] = 0.f;
  }
}

template <typename T, bool ONE_STATE>
__global__ void __launch_bounds__(ONE_STATE ? MAX_THREADS : MAX_THREADS / 2, 1)
    images_backward(const ScanCudaImages args, const ImagePlan plan) {
  SHARED_MEMORY(shared);
  using G = typename DeltaGradient<T>::Type;
  const int states = ONE_STATE ? 1 : plan.states, warps = int(blockDim.x / WARP);
  const ImageLayout layout = image_layout(plan, states, true);
  const Place place(args.batch, plan);
  const int lane = place.lane, row = place.row;

  float* const dt_row = shared + layout.dt + (place.warp * ROWS + row) * layout.dt_row;
  float* const bc_row = shared + layout.bc + place.warp * WARP + row * LANES;
  float* const totals = shared + layout.totals + place.warp * (states + 2) * CHANNELS + 2 * lane;
  const DirectionSum sum = direction_sum(shared + layout.sums, args.scratch, plan, place);
  const int64_t offset = place.sample * plan.length * plan.channels + place.channel;
  int turn = 0;

  for (int k = 0; k < 4; ++k) {
    load_weights(shared + layout.weights, args.dt_weight, plan, k, place.block_channel);
    const Source<T> source(args, plan, place, k);
    const float2 bias = args.dt_bias ? place.load(args.dt_bias + k * plan.channels) : make_float2(0.f, 0.f);
    const float2 D = k == 0 ? skip(args.D, plan, place) : make_float2(0.f, 0.f);  // once for all four directions
    const float* const saved = args.saved + (place.sample * 4 + k) * plan.tiles * states * plan.channels;
    G* const ddelta_out =
        static_cast<G*>(args.ddelta) + (k * args.batch + place.sample) * plan.length * plan.channels + place.channel;
    float* const dbc_out = args.dBC + (((place.block_channel / CHANNELS) * 4 + k) * args.batch + place.sample) * plan.length *
                                          2 * states;
    if (row == 0)
      for (int n = 0; n < states + 2; ++n) totals[n * CHANNELS] = totals[n * CHANNELS + 1] = 0.f;
    float dA[2] = {}, dbias[2] = {}, dD[2] = {};
    float q_tile[2] = {};  // the gradient a_{l+1} dL/dh_{l+1} that a tile gets from the steps after it
    float2 A = load_A(args.A, plan, place, k, 0, 1.f);

    for (int tile = plan.tiles - 1; tile >= 0; --tile) {
      const int step = (tile * plan.warps + place.own) * WARP_STEPS + row * STEPS;
      const Fetched<T> now = source.fetch(step);

      float delta[STEPS][2], slope[STEPS][2], x[STEPS][2], gy[STEPS][2], dx[STEPS][2], ddelta[STEPS][2] = {};
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        const bool valid = step + t < source.end && place.exists;
        float2 gy_pair = make_float2(0.f, 0.f);
        if (valid) gy_pair = load_pair(args.gy + offset + source.path.position(step + t) * plan.channels).unpack();
        const float2 x_pair = now.x[t].unpack();
        gy[t][0] = gy_pair.x, gy[t][1] = gy_pair.y;
        x[t][0] = x_pair.x, x[t][1] = x_pair.y;
      }
      source.project(delta, bias, now, step, dt_row, shared + layout.weights);
#pragma unroll
      for (int t = 0; t < STEPS; ++t)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          delta[t][v] = softplus(delta[t][v], slope[t][v]);
          if (step + t >= source.end) delta[t][v] = slope[t][v] = 0.f;
          dx[t][v] = (v ? D.y : D.x) * gy[t][v];
          if (k == 0) dD[v] = fmaf(gy[t][v], x[t][v], dD[v]);
        }

      for (int n = 0; n < states; ++n, turn ^= 1) {
        float B[STEPS], C[STEPS], a[STEPS][2];
        T bc = now.bc;
        if (!ONE_STATE) {
          A = load_A(args.A, plan, place, k, n, 1.f);
          if (n > 0) bc = source.fetch_bc(step, n);
        }
        exchange_bc(bc, bc_row, lane, B, C);
        const float2 h_tile = place.load(saved + (int64_t(tile) * states + n) * plan.channels);

        const float rate[2] = {A.x * LOG2_E, A.y * LOG2_E};
        Maps maps{{1.f, 1.f}, {0.f, 0.f}}, before, later{{1.f, 1.f}, {0.f, 0.f}}, after;
#pragma unroll
        for (int t = 0; t < STEPS; ++t)
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            a[t][v] = exp2_fast(delta[t][v] * rate[v]);
            maps.S[v] = fmaf(a[t][v], maps.S[v], delta[t][v] * x[t][v] * B[t]);
            maps.P[v] = decay_product(maps.P[v], a[t][v]);
          }
#pragma unroll
        for (int t = STEPS - 1; t >= 0; --t)
#pragma unroll
          for (int v = 0; v < 2; ++v) later.S[v] = a[t][v] * fmaf(C[t], gy[t][v], later.S[v]);
#pragma unroll
        for (int v = 0; v < 2; ++v) later.P[v] = maps.P[v];
        scan_rows<false>(maps, before, row);
        scan_rows<true>(later, after, row);

        float4* const carry = reinterpret_cast<float4*>(shared + layout.carry) + turn * warps * LANES;
        float2* const reverse = reinterpret_cast<float2*>(shared + layout.reverse) + turn * warps * LANES;
        if (row == ROWS - 1) carry[place.warp * LANES + lane] = make_float4(maps.P[0], maps.P[1], maps.S[0], maps.S[1]);
        if (row == 0) reverse[place.warp * LANES + lane] = make_float2(later.S[0], later.S[1]);
        __syncthreads();

        float h[2] = {h_tile.x, h_tile.y}, q[2] = {};
#pragma unroll 2
        for (int warp = 0; warp < place.own; ++warp) {
          const float4 map = carry[(place.group * plan.warps + warp) * LANES + lane];
          h[0] = fmaf(map.x, h[0], map.z);
          h[1] = fmaf(map.y, h[1], map.w);
        }
        // With several states their q are in shared memory, in two copies: this tile reads one and writes the other.
        const int entering = layout.entering + (place.group * states + n) * CHANNELS + 2 * lane;
        const int copy = plan.samples * states * CHANNELS;
        if (!ONE_STATE) {
          const float* const from = shared + entering + (tile & 1) * copy;
          const bool start = tile == plan.tiles - 1;
          q_tile[0] = start ? 0.f : from[0], q_tile[1] = start ? 0.f : from[1];
        }
#pragma unroll 2
        for (int warp = plan.warps - 1; warp >= 0; --warp) {
          if (warp == place.own) q[0] = q_tile[0], q[1] = q_tile[1];
          const int at = (place.group * plan.warps + warp) * LANES + lane;
          q_tile[0] = fmaf(carry[at].x, q_tile[0], reverse[at].x);
          q_tile[1] = fmaf(carry[at].y, q_tile[1], reverse[at].y);
        }
        if (!ONE_STATE && place.own == 0 && row == 0) {
          float* const to = shared + entering + (~tile & 1) * copy;
          to[0] = q_tile[0], to[1] = q_tile[1];
        }

        float decayed[STEPS][2], dbc[LANES] = {};
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          h[v] = fmaf(before.P[v], h[v], before.S[v]);
          q[v] = fmaf(after.P[v], q[v], after.S[v]);
        }
#pragma unroll
        for (int t = 0; t < STEPS; ++t)
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            decayed[t][v] = a[t][v] * h[v];
            h[v] = fmaf(delta[t][v] * x[t][v], B[t], decayed[t][v]);
            dbc[STEPS + t] = fmaf(gy[t][v], h[v], dbc[STEPS + t]);
          }
#pragma unroll
        for (int t = STEPS - 1; t >= 0; --t)
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            const float g = fmaf(C[t], gy[t][v], q[v]);  // dL/dh
            const float g_decayed = g * decayed[t][v];
            q[v] = a[t][v] * g;
            dbc[t] = fmaf(g, delta[t][v] * x[t][v], dbc[t]);
            dx[t][v] = fmaf(g * B[t], delta[t][v], dx[t][v]);
            ddelta[t][v] = fmaf(g * B[t], x[t][v], fmaf(g_decayed, v ? A.y : A.x, ddelta[t][v]));
            dA[v] = fmaf(g_decayed, delta[t][v], dA[v]);
          }
        if (!ONE_STATE) add_total(totals + n * CHANNELS, dA, row);
        const float dbc_sum = sum_over_row(dbc, lane);
        if (step + lane % STEPS < source.end) {
          const int at = source.path.position(step + lane % STEPS) * 2 * states;
          dbc_out[at + (lane < STEPS ? 0 : states) + n] = dbc_sum;
        }
      }
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        const float2 value = make_float2(ddelta[t][0] * slope[t][0], ddelta[t][1] * slope[t][1]);
        dbias[0] += value.x, dbias[1] += value.y;
        if (step + t >= source.end || !place.exists) continue;
        const int position = source.path.position(step + t);
        store_pair(ddelta_out + position * plan.channels, value);
        sum.add(position, make_float2(dx[t][0], dx[t][1]), k == 0);
      }
    }

    if (ONE_STATE) add_total(totals, dA, row);
    add_total(totals + states * CHANNELS, dbias, row);
    add_total(totals + (states + 1) * CHANNELS, dD, row);
    __syncthreads();
    for (int i = threadIdx.x; i < (states + 2) * CHANNELS; i += blockDim.x) {
      float value = 0.f;
      for (int w = 0; w < warps; ++w) value += shared[layout.totals + w * (states + 2) * CHANNELS + i];
      const int channel = place.block_channel + i % CHANNELS;
      const int64_t at = (int64_t(blockIdx.x / plan.channel_blocks) * 4 + k) * (states + 2) + i / CHANNELS;
      if (channel < plan.channels) args.sums[at * plan.channels + channel] = value;
    }
  }
  write_sum(sum, static_cast<T*>(args.dx), plan, place);
}
