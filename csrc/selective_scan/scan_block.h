// What the 2D scan needs around its tiles: memory, threads, packing of parameters, sums over tasks.
//
// A task scans one group of channel blocks of one group of samples. The number of groups depends on the shapes alone, not on
// the number of threads, and sums over groups are taken in their order: results always have the same bits.
#pragma once

#include <stdlib.h>

#include "scan_tile.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
inline int64_t round_up(int64_t value, int64_t to) { return divide_up(value, to) * to; }
inline void clear(float* values, int64_t count) { memset(values, 0, sizeof(float) * count); }

// Divides one allocation into pieces; with a null base it only measures the size.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T = float>
  T* take(int64_t count) {
    T* const piece = (T*)(base + used);
    used += round_up(count * (int64_t)sizeof(T), 64);
    return piece;
  }
};

// 64-byte aligned memory, freed at the end of the scope; `base` is null if the allocation failed.
struct Memory {
  char* const base;
  explicit Memory(int64_t bytes) : base((char*)aligned_alloc(64, round_up(bytes + 1, 64))) {}
  ~Memory() { free(base); }
  Memory(const Memory&) = delete;
};

// Flushes subnormal numbers to zero: a state that decays for long becomes subnormal, and some processors are a hundred times
// slower with those.
class FlushSubnormals {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();

 public:
  FlushSubnormals() { _mm_setcsr(before | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;

 public:
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" ::"r"(before | 1 << 24));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};

// Calls body(task, thread) for every task, on at most `threads` threads.
template <typename Body>
void parallel(int64_t tasks, int64_t threads, const Body& body) {
#if defined(_OPENMP)
#pragma omp parallel num_threads((int)(threads < tasks ? threads : tasks < 1 ? 1 : tasks))
  {
    const FlushSubnormals flush;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
  }
#else
  const FlushSubnormals flush;
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
#endif
}

// Number of tasks to aim at for a scan of B * 4 * D * L elements: enough to keep the cores of a machine busy, fewer for small
// scans, because adding up the groups costs time.
inline int64_t task_count(int64_t elements) { return elements < 1 << 19 ? 8 : elements < 1 << 20 ? 16 : 32; }

// `total` items in `count` groups of nearly equal size.
struct Groups {
  int64_t total, count;
  int64_t first(int64_t group) const { return group * total / count; }
};

struct Split {
  Groups samples, blocks;
};

// Divides the work into enough tasks, such that the least has to be added up afterwards: `block_cost` floats for every group
// of blocks, `sample_cost` floats for every group of samples.
inline Split split(int64_t tasks, int64_t batch, int64_t blocks, int64_t block_cost, int64_t sample_cost) {
  Split best = {};
  int64_t least = INT64_MAX;
  for (int64_t groups = 1; groups <= blocks; ++groups) {
    const int64_t samples = at_most(divide_up(tasks, groups), batch);
    const int64_t missing = tasks - at_most(samples * groups, tasks);
    const int64_t cost = groups * block_cost + samples * sample_cost + (missing << 40);
    if (cost < least) {
      least = cost;
      best = {{batch, samples}, {blocks, groups}};
    }
  }
  return best;
}

// Sizes and pointers of the parameters. D and bias may be null.
struct Model {
  int64_t channels, rank, states;
  const float *weight, *A, *D, *bias;

  int64_t blocks() const { return divide_up(channels, BLOCK); }
  int64_t gradient_size() const { return (rank + states + 2) * BLOCK; }  // of one block in one direction
};

inline Parameters take_parameters(Arena& arena, const Model& m, bool backward) {
  return {arena.take(m.rank * BLOCK), backward ? arena.take(round_up(m.rank, LANES) * BLOCK) : nullptr, arena.take(BLOCK),
          arena.take(m.states * BLOCK)};
}

// Packs the parameters of `count` channels from row `first` (direction * D + channel) on; the others of the block are zeros.
inline void pack(const Model& m, int64_t first, int64_t count, const Parameters& p) {
  clear(p.bias, BLOCK);
  if (count < BLOCK) {
    clear(p.weight, m.rank * BLOCK);
    clear(p.A, m.states * BLOCK);
  }
  transpose(m.weight + first * m.rank, m.rank, count, m.rank, p.weight, BLOCK, LOG2E);
  transpose(m.A + first * m.states, m.states, count, m.states, p.A, BLOCK, 1.f);
  for (int64_t c = 0; m.bias && c < count; ++c) p.bias[c] = LOG2E * m.bias[first + c];
  if (!p.weight_transposed) return;
  const int64_t stride = round_up(m.rank, LANES);
  if (count < BLOCK) clear(p.weight_transposed, stride * BLOCK);
  for (int64_t c = 0; c < count; ++c)
    for (int64_t r = 0; r < m.rank; r += LANES)
      store(p.weight_transposed + c * stride + r, load_some(m.weight + (first + c) * m.rank + r, m.rank - r) * LOG2E);
}

// The gradients of a block in one direction are one piece of m.gradient_size() floats: weight, bias, A, then D.
inline Gradients gradients(const Model& m, float* piece) {
  return {piece, piece + m.rank * BLOCK, piece + (m.rank + 1) * BLOCK};
}

inline float* gradient_of_D(const Model& m, float* piece) { return piece + (m.rank + 1 + m.states) * BLOCK; }

// Adds the pieces [groups, blocks, 4] over the groups of samples and writes the gradients of the parameters.
inline void finish_gradients(const Model& m, float* pieces, int64_t groups, int64_t threads, float* dweight, float* dA, float* dD,
                             float* dbias) {
  const int64_t size = m.gradient_size(), stride = m.blocks() * 4 * size;
  parallel(m.blocks() * 4, threads, [&](int64_t task, int) {
    const int64_t channel = task / 4 * BLOCK, first = task % 4 * m.channels + channel;
    const int64_t count = at_most(m.channels - channel, BLOCK);
    float* const sum = pieces + task * size;
    for (int64_t group = 1; group < groups; ++group)
      for (int64_t i = 0; i < size; i += LANES) store(sum + i, load(sum + i) + load(sum + group * stride + i));
    const Gradients grad = gradients(m, sum);
    transpose(grad.weight, BLOCK, m.rank, count, dweight + first * m.rank, m.rank, LOG2E);
    transpose(grad.A, BLOCK, m.states, count, dA + first * m.states, m.states, LN2);
    for (int64_t c = 0; dbias && c < count; ++c) dbias[first + c] = LOG2E * grad.bias[c];
    for (int64_t c = 0; dD && c < count; ++c) dD[first + c] = LOG2E * gradient_of_D(m, sum)[c];
  });
}

// to[i] = sum over groups of from[group * stride + i]
inline void add_groups(const float* from, int64_t groups, int64_t stride, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += LANES) {
    Vec sum = {};
    for (int64_t group = 0; group < groups; ++group) sum += load_some(from + group * stride + i, count - i);
    store_some(to + i, sum, count - i);
  }
}

}  // namespace
