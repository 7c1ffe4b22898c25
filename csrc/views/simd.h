// Vectors as wide as in the instruction set that this file is compiled for, and the few functions of them that compilers do not
// find by themselves. Everything is in an unnamed namespace, because the source is compiled once per instruction set, and the
// linker must not merge the functions of two.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // compiled once instead of into each of its callers

namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int SHORTS = 2 * LANES;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef int16_t ShortVec __attribute__((vector_size(LANES * 4)));
typedef float Float4 __attribute__((vector_size(16)));

template <typename V, typename T>
INLINE V load(const T* source) {
  V value;
  memcpy(&value, source, sizeof value);
  return value;
}

template <typename V, typename T>
INLINE void store(T* target, V value) {
  memcpy(target, &value, sizeof value);
}

INLINE int64_t at_most(int64_t value, int64_t high) { return value < high ? value : high; }
INLINE int64_t at_least(int64_t value, int64_t low) { return value > low ? value : low; }
INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) { return at_least(at_most(value, high), low); }
INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// SHORTS bytes, widened.
INLINE ShortVec load_bytes(const uint8_t* source) {
#if defined(__AVX512BW__)
  return (ShortVec)_mm512_cvtepu8_epi16(load<__m256i>(source));
#elif defined(__AVX2__)
  return (ShortVec)_mm256_cvtepu8_epi16(load<__m128i>(source));
#else
  ShortVec value;
  for (int i = 0; i < SHORTS; ++i) value[i] = source[i];
  return value;
#endif
}

// The product of two fixed-point numbers with 15 fractional bits, rounded: a * b / 2^15.
INLINE ShortVec multiply(ShortVec a, ShortVec b) {
#if defined(__AVX512BW__)
  return (ShortVec)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (ShortVec)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b);
#else
  ShortVec product;
  for (int i = 0; i < SHORTS; ++i) product[i] = (int16_t)(((int32_t)a[i] * b[i] + (1 << 14)) >> 15);
  return product;
#endif
}

// A pixel has 4 bytes: red, green, blue, and one that is ignored. Four pixels as floats -> rounded, limited to 0..255.
INLINE void round_pixels(const Float4 (&values)[4], uint32_t (&pixels)[4]) {
#if defined(__x86_64__)
  const __m128i low = _mm_packs_epi32(_mm_cvtps_epi32((__m128)values[0]), _mm_cvtps_epi32((__m128)values[1]));
  const __m128i high = _mm_packs_epi32(_mm_cvtps_epi32((__m128)values[2]), _mm_cvtps_epi32((__m128)values[3]));
  store(pixels, _mm_packus_epi16(low, high));
#else
  for (int i = 0; i < 4; ++i) {
    pixels[i] = 0;
    for (int c = 0; c < 4; ++c) pixels[i] |= (uint32_t)clamp(__builtin_lrintf(values[i][c]), 0, 255) << (8 * c);
  }
#endif
}

INLINE Float4 pixel_to_floats(uint32_t pixel) {
#if defined(__SSE4_1__)
  return (Float4)_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)pixel)));
#else
  return Float4{(float)(pixel & 255), (float)(pixel >> 8 & 255), (float)(pixel >> 16 & 255), (float)(pixel >> 24)};
#endif
}

}  // namespace
