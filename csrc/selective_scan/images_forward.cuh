// Forward kernel of images: see images.cuh.
#pragma once

#include "images.cuh"

template <typename T, bool ONE_STATE>
__global__ void __launch_bounds__(ONE_STATE ? MAX_THREADS : MAX_THREADS / 2, 1)
    images_forward(const ScanCudaImages args, const ImagePlan plan) {
  SHARED_MEMORY(shared);
  const int states = ONE_STATE ? 1 : plan.states;
  const ImageLayout layout = image_layout(plan, states, false);
  const Place place(args.batch, plan);
  const int lane = place.lane, row = place.row;

  float* const dt_row = shared + layout.dt + (place.warp * ROWS + row) * layout.dt_row;
  float* const bc_row = shared + layout.bc + place.warp * WARP + row * LANES;
  const DirectionSum sum = direction_sum(shared + layout.sums, args.y, plan, place);
  int turn = 0;

  for (int k = 0; k < 4; ++k) {
    load_weights(shared + layout.weights, args.dt_weight, plan, k, place.block_channel);
    const Source<T> source(args, plan, place, k);
    const float2 bias = args.dt_bias ? place.load(args.dt_bias + k * plan.channels) : make_float2(0.f, 0.f);
    const float2 D = k == 0 ? skip(args.D, plan, place) : make_float2(0.f, 0.f);  // once for all four directions
    float* const saved = args.saved + (place.sample * 4 + k) * plan.tiles * states * plan.channels + place.channel;
    float h_tile[2] = {};
    float2 A = load_A(args.A, plan, place, k, 0, LOG2_E);

    int step = place.own * WARP_STEPS + row * STEPS;
    Fetched<T> next = source.fetch(step);
    for (int tile = 0; tile < plan.tiles; ++tile) {
      const Fetched<T> now = next;
      const int next_step = step + plan.warps * WARP_STEPS;
      if (tile + 1 < plan.tiles) next = source.fetch(next_step);

      float delta[STEPS][2], du[STEPS][2], y[STEPS][2];
      source.project(delta, bias, now, step, dt_row, shared + layout.weights);
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        const float2 x = now.x[t].unpack();
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          float slope;
          delta[t][v] = step + t < source.end ? softplus(delta[t][v], slope) : 0.f;  // 0: h stays the same
          du[t][v] = delta[t][v] * (v ? x.y : x.x);
          y[t][v] = v ? D.y * x.y : D.x * x.x;
        }
      }

      for (int n = 0; n < states; ++n, turn ^= 1) {
        float B[STEPS], C[STEPS], a[STEPS][2];
        T bc = now.bc;
        if (!ONE_STATE) {
          A = load_A(args.A, plan, place, k, n, LOG2_E);
          if (n > 0) bc = source.fetch_bc(step, n);
        }
        exchange_bc(bc, bc_row, lane, B, C);

        Maps maps{{1.f, 1.f}, {0.f, 0.f}}, before;
#pragma unroll
        for (int t = 0; t < STEPS; ++t)
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            a[t][v] = exp2_fast(delta[t][v] * (v ? A.y : A.x));
            maps.S[v] = fmaf(a[t][v], maps.S[v], du[t][v] * B[t]);
            maps.P[v] = decay_product(maps.P[v], a[t][v]);
          }
        scan_rows<false>(maps, before, row);
        float4* const carry = reinterpret_cast<float4*>(shared + layout.carry) + turn * (blockDim.x / WARP) * LANES;
        if (row == ROWS - 1) carry[place.warp * LANES + lane] = make_float4(maps.P[0], maps.P[1], maps.S[0], maps.S[1]);
        __syncthreads();

        float* const kept = saved + (int64_t(tile) * states + n) * plan.channels;
        if (!ONE_STATE) {
          const float2 h_kept = tile && place.exists ? load_pair(kept).unpack() : make_float2(0.f, 0.f);
          h_tile[0] = h_kept.x, h_tile[1] = h_kept.y;
        }
        const bool writes = place.own == 0 && row == 0 && place.present && place.exists;
        if (writes && (ONE_STATE || tile == 0)) store_pair(kept, make_float2(h_tile[0], h_tile[1]));

        float h[2] = {};
#pragma unroll 2
        for (int warp = 0; warp < plan.warps; ++warp) {
          if (warp == place.own) h[0] = h_tile[0], h[1] = h_tile[1];
          const float4 map = carry[(place.group * plan.warps + warp) * LANES + lane];
          h_tile[0] = fmaf(map.x, h_tile[0], map.z);
          h_tile[1] = fmaf(map.y, h_tile[1], map.w);
        }
        if (!ONE_STATE && writes && tile + 1 < plan.tiles)  // read by the next tile, after a barrier
          store_pair(kept + states * plan.channels, make_float2(h_tile[0], h_tile[1]));

#pragma unroll
        for (int v = 0; v < 2; ++v) {
          h[v] = fmaf(before.P[v], h[v], before.S[v]);
#pragma unroll
          for (int t = 0; t < STEPS; ++t) {
            h[v] = fmaf(a[t][v], h[v], du[t][v] * B[t]);
            y[t][v] = fmaf(C[t], h[v], y[t][v]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < STEPS; ++t)
        if (step + t < source.end && place.exists)
          sum.add(source.path.position(step + t), make_float2(y[t][0], y[t][1]), k == 0);
      step = next_step;
    }
  }
  if (plan.sums_shared) write_sum(sum, args.y, plan, place);
}
