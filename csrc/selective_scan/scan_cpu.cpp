// The scans for one instruction set. build_tool.py compiles this file once per instruction set; SCAN_VARIANT is its name.
#include "scan_cpu.h"

#include "scan_1d.h"
#include "scan_2d.h"

namespace {

template <template <typename> class Scan, typename Args>
ScanStatus forward(const Args* args) {
  switch (args->type) {
    case SCAN_BFLOAT16: return Scan<BFloat16>(*args).forward();
    case SCAN_FLOAT16: return Scan<Float16>(*args).forward();
    default: return Scan<float>(*args).forward();
  }
}

template <template <typename> class Scan, typename Args>
ScanStatus backward(const Args* args) {
  switch (args->type) {
    case SCAN_BFLOAT16: return Scan<BFloat16>(*args).backward();
    case SCAN_FLOAT16: return Scan<Float16>(*args).backward();
    default: return Scan<float>(*args).backward();
  }
}

// The arithmetic of a scan on one tile, repeated: all data stays in the first-level cache.
ScanStatus arithmetic(int64_t rank, int64_t states, int64_t with_backward, int64_t elements, int64_t threads) {
  const Model model = {BLOCK, rank, states, nullptr, nullptr, nullptr, nullptr};
  const int64_t width = rank + 2 * states;
  struct Space {
    Parameters parameters;
    float *u, *y, *gy, *du, *state, *carry, *proj, *dproj, *piece;
    Tile* tile;
    Work* work;
    Space(Arena& arena, const Model& m, int64_t width) : parameters(take_parameters(arena, m, true)) {
      for (float** each : {&u, &y, &gy, &du}) *each = arena.take(TILE * BLOCK);
      for (float** each : {&state, &carry}) *each = arena.take(m.states * BLOCK);
      for (float** each : {&proj, &dproj}) *each = arena.take(TILE * width + LANES);
      piece = arena.take(m.gradient_size());
      tile = arena.take<Tile>(1);
      work = arena.take<Work>(1);
    }
  };
  Arena arena = {nullptr};
  Space(arena, model, width);
  const Memory memory(arena.used * threads);
  if (!memory.base) return SCAN_OUT_OF_MEMORY;
  memset(memory.base, 0, arena.used * threads);
  parallel(threads, threads, [&](int64_t task, int) {
    Arena own = {memory.base + task * arena.used};
    const Space s(own, model, width);
    s.tile->count = TILE;
    for (int t = 0; t < TILE; ++t) {
      s.tile->at[t] = t * BLOCK;
      s.tile->proj[t] = s.proj + t * width;
      s.tile->dproj[t] = s.dproj + t * width;
    }
    const Gradients grad = gradients(model, s.piece);
    for (int64_t i = elements * task / threads; i < elements * (task + 1) / threads; i += TILE * BLOCK) {
      project(*s.tile, s.parameters, rank, *s.work);
      if (with_backward) {
        softplus<true>(TILE, *s.work);
        scan_backward(*s.tile, s.parameters, rank, states, s.u, s.gy, s.du, s.state, s.carry, grad, *s.work);
        project_backward(*s.tile, s.parameters, rank, *s.work, grad);
      } else {
        softplus<false>(TILE, *s.work);
        scan_forward(*s.tile, s.parameters, rank, states, s.u, s.y, s.state, *s.work);
      }
    }
  });
  return SCAN_OK;
}

}  // namespace

extern const ScanKernels SCAN_VARIANT = {forward<Scan1d>, backward<Scan1d>, forward<Scan2d>, backward<Scan2d>, arithmetic};
