// Shared by the CUDA kernels: number types, softplus and exp, products of decays.
#pragma once

#ifdef SCAN_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define SHARED_MEMORY(name) extern __shared__ __align__(16) float name[]
#endif

constexpr int WARP = 32;
constexpr int STEPS = 4;  // consecutive positions of a thread
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOG2_E = 1.44269504f;
constexpr float LARGEST = 3.4028234e38f;

// Half types as bits: the classes of CUDA's headers are not loaded and stored in pairs.
struct Bfloat16 {
  unsigned short bits;
};
struct Float16 {
  unsigned short bits;
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
__device__ inline float to_float(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

__device__ inline void from_float(float value, float& out) { out = value; }
__device__ inline void from_float(float value, Bfloat16& out) {  // rounds to nearest, ties to even
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const unsigned bits = __float_as_uint(value);
  out.bits = value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
#endif
}
__device__ inline void from_float(float value, Float16& out) { out.bits = __half_as_ushort(__float2half_rn(value)); }

// Two adjacent channels as they are in memory. `unpack` is separate because it waits for the load.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  unsigned bits;

  __device__ float2 unpack() const {
    const T first{static_cast<unsigned short>(bits & 0xffff)}, second{static_cast<unsigned short>(bits >> 16)};
    return make_float2(to_float(first), to_float(second));
  }
};
template <>
struct Pair<float> {
  float2 values;

  __device__ float2 unpack() const { return values; }
};

template <typename T>
__device__ inline Pair<T> load_pair(const T* from) {
  return *reinterpret_cast<const Pair<T>*>(from);
}

template <typename T>
__device__ inline void store_pair(T* to, float2 value) {
  T first, second;
  from_float(value.x, first);
  from_float(value.y, second);
  *reinterpret_cast<Pair<T>*>(to) = {first.bits | unsigned(second.bits) << 16};
}
__device__ inline void store_pair(float* to, float2 value) { *reinterpret_cast<float2*>(to) = value; }

// 2^x, with an error of 2 units in the last place; results below 1e-38 become 0.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// log(1 + e^x) and its derivative, from one exponential and one division.
// With e = exp(-|x|) and z = e / (2 + e): log(1 + e) = 2 atanh(z) = z q(z^2), z <= 1/3; q is a minimax polynomial (error 4e-9).
// lg2.approx would lose the digits of a small delta, and VMamba's are small.
__device__ inline float softplus(float x, float& slope) {
  const float e = exp2_fast(-LOG2_E * fabsf(x));
  const float inverse = __fdividef(1.f, (1.f + e) * (2.f + e));
  const float z = e * (1.f + e) * inverse;
  const float s = z * z;
  const float q = fmaf(fmaf(fmaf(fmaf(.28157780f, s, .27965158f), s, .40024596f), s, .66666323f), s, 2.f);
  slope = (x >= 0.f ? 1.f : e) * (2.f + e) * inverse;
  return fmaf(z, q, fmaxf(x, 0.f));
}

// Product of decays, kept finite: where decays exceed 1 (delta < 0), an infinite product would turn a state of 0 into NaN.
__device__ inline float decay_product(float P, float Q) { return fminf(P * Q, LARGEST); }
