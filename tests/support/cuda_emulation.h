// Runs CUDA kernels on a CPU, to test them without a GPU: included instead of the CUDA headers, compiled by g++.
//
// The threads of a block are fibers that are switched only at barriers and shuffles. With a seed, the next one to run is drawn
// at random, so that a missing barrier changes the results. Shared memory starts as NaN. The next cudaGetLastError returns an
// error if some threads of a block or warp do not reach a barrier or shuffle, if they reach it on different lines, or if a
// kernel uses more shared memory than it was allowed.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, block, shared, stream, ...)                              \
  emulation::launch(reinterpret_cast<const void*>(kernel), grid, block, shared, [&] { \
    (void)(stream);                                                                   \
    kernel(__VA_ARGS__);                                                              \
  })
#define SHARED_MEMORY(name) float* const name = emulation::machine.shared.data()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}

using __half = _Float16;
inline float __half2float(__half value) { return float(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline __half __ushort_as_half(unsigned short bits) {
  __half value;
  memcpy(&value, &bits, 2);
  return value;
}
inline unsigned short __half_as_ushort(__half value) {
  unsigned short bits;
  memcpy(&bits, &value, 2);
  return bits;
}

namespace emulation {

constexpr unsigned WARP_SIZE = 32;
constexpr size_t STACK = 128 << 10;

enum class State { READY, AT_BARRIER, AT_WARP, FINISHED };

struct Fiber {
  State state;
  bool started;
  int line;  // line of the barrier or shuffle where it waits
  unsigned rounds;  // shuffles so far
  uint64_t values[2];  // arguments of the last two shuffles
  jmp_buf at;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Machine {
  uint64_t seed = 0;
  int shared_limit = 227 << 10;
  std::vector<std::pair<const void*, int>> allowed;  // shared memory of kernels that requested more than 48 KiB
  std::vector<float> shared;
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  unsigned current = 0;
  jmp_buf scheduler;
  std::string error, reported;
};
inline Machine machine;

inline void entry() {
  machine.kernel();
  machine.fibers[threadIdx.x].state = State::FINISHED;
  _longjmp(machine.scheduler, 1);
}

inline void resume(unsigned thread) {
  machine.current = threadIdx.x = thread;
  if (_setjmp(machine.scheduler)) return;
  Fiber& fiber = machine.fibers[thread];
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Suspends the fiber until all that it waits for have arrived.
inline void wait(State state, int line) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  fiber.line = line;
  if (!_setjmp(fiber.at)) _longjmp(machine.scheduler, 1);
}

// Makes fibers [begin, end) ready if all of them wait in this state on the same line.
inline bool release(unsigned begin, unsigned end, State state) {
  auto& fibers = machine.fibers;
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].state != state) return false;
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].line != fibers[begin].line) {
      machine.error = "emulation: threads " + std::to_string(begin) + " and " + std::to_string(i) + " meet on lines " +
                      std::to_string(fibers[begin].line) + " and " + std::to_string(fibers[i].line);
      return false;
    }
  for (unsigned i = begin; i < end; ++i) fibers[i].state = State::READY;
  return true;
}

inline std::string stuck() {
  std::string text = "emulation: threads wait for others that do not come:";
  for (unsigned i = 0; i < blockDim.x && text.size() < 500; ++i)
    if (machine.fibers[i].state != State::FINISHED)
      text += " " + std::to_string(i) + " on line " + std::to_string(machine.fibers[i].line);
  return text;
}

inline void run_block() {
  const unsigned threads = blockDim.x;
  std::vector<unsigned> ready(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.state = State::READY;
    fiber.started = false;
    fiber.rounds = 0;
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    ready[i] = threads - 1 - i;  // taken from the end
  }
  unsigned finished = 0;
  while (!ready.empty() && machine.error.empty()) {
    if (machine.seed) {  // xorshift
      machine.seed ^= machine.seed << 13, machine.seed ^= machine.seed >> 7, machine.seed ^= machine.seed << 17;
      std::swap(ready[machine.seed % ready.size()], ready.back());
    }
    const unsigned thread = ready.back();
    ready.pop_back();
    resume(thread);
    const State state = machine.fibers[thread].state;
    unsigned begin = 0, end = threads;
    if (state == State::AT_WARP) begin = thread / WARP_SIZE * WARP_SIZE, end = begin + WARP_SIZE;
    if (state == State::FINISHED)
      ++finished;
    else if (release(begin, end, state))
      for (unsigned i = end; i-- > begin;) ready.push_back(i);
  }
  if (finished < threads && machine.error.empty()) machine.error = stuck();
}

template <typename Kernel>
void launch(const void* name, unsigned grid, unsigned block, int shared, Kernel kernel) {
  int allowed = 48 << 10;
  for (const auto& entry : machine.allowed)
    if (entry.first == name) allowed = entry.second;
  if (shared > std::max(allowed, 48 << 10)) machine.error = "emulation: more shared memory than the kernel was allowed";
  if (block == 0 || block > 1024 || block % WARP_SIZE) machine.error = "emulation: wrong number of threads";
  if (machine.fibers.size() < block) machine.fibers = std::vector<Fiber>(block);
  machine.kernel = kernel;
  gridDim.x = grid;
  blockDim.x = block;
  for (blockIdx.x = 0; blockIdx.x < grid && machine.error.empty(); ++blockIdx.x) {
    machine.shared.assign((shared + 3) / 4, std::numeric_limits<float>::quiet_NaN());
    machine.shared.shrink_to_fit();
    run_block();
  }
}

// Takes one value from every lane of the warp, returns that of lane `from`. Two slots: a lane can be one shuffle ahead.
template <typename T>
T exchange(unsigned mask, T value, unsigned from, int line) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "numbers only");
  if (mask != 0xffffffffu) machine.error = "emulation: only whole warps shuffle, line " + std::to_string(line);
  const unsigned thread = machine.current;
  const unsigned slot = machine.fibers[thread].rounds++ % 2;
  memcpy(&machine.fibers[thread].values[slot], &value, sizeof(T));
  wait(State::AT_WARP, line);
  memcpy(&value, &machine.fibers[thread / WARP_SIZE * WARP_SIZE + from].values[slot], sizeof(T));
  return value;
}

inline unsigned lane() { return machine.current % WARP_SIZE; }

}  // namespace emulation

inline void __syncthreads(int line = __builtin_LINE()) { emulation::wait(emulation::State::AT_BARRIER, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { emulation::exchange(mask, 0, 0, line); }

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned away, int line = __builtin_LINE()) {
  const unsigned lane = emulation::lane();
  return emulation::exchange(mask, value, lane >= away ? lane - away : lane, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned away, int line = __builtin_LINE()) {
  const unsigned lane = emulation::lane();
  return emulation::exchange(mask, value, lane + away < emulation::WARP_SIZE ? lane + away : lane, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int line = __builtin_LINE()) {
  return emulation::exchange(mask, value, emulation::lane() ^ bits, line);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {};

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::machine.shared_limit;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulation::machine.shared_limit) return cudaErrorUnknown;
  emulation::machine.allowed.emplace_back(kernel, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  emulation::machine.reported.swap(emulation::machine.error);
  emulation::machine.error.clear();
  return emulation::machine.reported.empty() ? cudaSuccess : cudaErrorUnknown;
}
inline const char* cudaGetErrorString(cudaError_t) { return emulation::machine.reported.c_str(); }

// For the tests. Seed 0 runs threads in order, any other at random; shared_limit: bytes of shared memory per block.
extern "C" inline void emulation_configure(uint64_t seed, int shared_limit) {
  emulation::machine.seed = seed;
  emulation::machine.shared_limit = shared_limit;
}
extern "C" __attribute__((used)) void (*const emulation_keep)(uint64_t, int) = emulation_configure;
