// Vectors of floats, as wide as in the instruction set that this file is compiled for, and functions of them: loads and stores
// of three types, exp2, softplus, transposition. Everything is in an unnamed namespace, because the source is compiled once
// per instruction set, and the linker must not merge the functions of two.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(LANES * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

INLINE Vec broadcast(float value) { return value - Vec{}; }

// The larger and the smaller of the two; NaN where `b` is NaN.
#if defined(__AVX512F__)
INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Vec smaller(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE Vec smaller(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__x86_64__)
INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm_max_ps((__m128)a, (__m128)b); }
INLINE Vec smaller(Vec a, Vec b) { return (Vec)_mm_min_ps((__m128)a, (__m128)b); }
#else
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
#endif

INLINE int64_t at_most(int64_t value, int64_t high) { return value < high ? value : high; }
INLINE int64_t at_least(int64_t value, int64_t low) { return value > low ? value : low; }

// ---- loads and stores; load_some and store_some read lanes from `count` on as 0 and do not write them ----

INLINE Vec load(const float* from) {
  Vec value;
  memcpy(&value, from, sizeof value);
  return value;
}

INLINE void store(float* to, Vec value) { memcpy(to, &value, sizeof value); }

INLINE Vec load(const BFloat16* from) {
  HalfBits half;
  memcpy(&half, from, sizeof half);
  return (Vec)(__builtin_convertvector(half, Bits) << 16);
}

INLINE void store(BFloat16* to, Vec value) {
  const Bits bits = (Bits)value;
  const Bits nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfBits half = __builtin_convertvector(value == value ? nearest_even : (bits >> 16) | 0x40, HalfBits);
  memcpy(to, &half, sizeof half);
}

#if defined(__AVX512F__)
INLINE Vec load(const Float16* from) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
INLINE void store(Float16* to, Vec value) { _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, 0)); }
#elif defined(__F16C__)
INLINE Vec load(const Float16* from) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
INLINE void store(Float16* to, Vec value) { _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, 0)); }
#elif defined(__aarch64__)
INLINE Vec load(const Float16* from) { return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits))); }
INLINE void store(Float16* to, Vec value) { vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)value))); }
#else
INLINE Vec load(const Float16* from) {
  HalfBits half;
  memcpy(&half, from, sizeof half);
  const Bits bits = __builtin_convertvector(half, Bits), exponent = bits & 0x7c00, magnitude = (bits & 0x7fff) << 13;
  const Vec normal = (Vec)(magnitude + ((127 - 15) << 23));
  const Vec special = (Vec)(magnitude + ((255 - 31) << 23));                                         // infinities and NaN
  const Vec subnormal = (Vec)(magnitude + ((127 - 14) << 23)) - (Vec)(Bits{} + ((127 - 14) << 23));  // and zero
  const Vec value = exponent == 0 ? subnormal : exponent == 0x7c00 ? special : normal;
  return (Vec)((Bits)value | (bits & 0x8000) << 16);
}

INLINE void store(Float16* to, Vec value) {
  const Bits bits = (Bits)value, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const Bits normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Vec shift = broadcast(0.5f);  // adding it leaves the digits of a subnormal number, rounded, in the lowest bits
  const Bits subnormal = (Bits)((Vec)magnitude + shift) - (Bits)shift;
  Bits half = magnitude < ((127 - 14) << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : half;  // rounds to 65536 or more
  half = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : half;
  const HalfBits result = __builtin_convertvector(half | sign, HalfBits);
  memcpy(to, &result, sizeof result);
}
#endif

template <typename T>
INLINE Vec load_some(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T some[LANES] = {};
  for (int64_t lane = 0; lane < count; ++lane) some[lane] = from[lane];
  return load(some);
}

template <typename T>
INLINE void store_some(T* to, Vec value, int64_t count) {
  if (count >= LANES) return store(to, value);
  T some[LANES];
  store(some, value);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = some[lane];
}

// ---- functions; NaN in, NaN out ----

// Four vectors. A polynomial is a long chain of operations, each of which waits for the one before: four interleaved chains
// keep the processor busy, while a single one would leave it idle half of the time.
struct Quad {
  Vec a, b, c, d;
};

INLINE Quad operator+(Quad x, Quad y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
INLINE Quad operator-(Quad x, Quad y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
INLINE Quad operator*(Quad x, Quad y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
INLINE Quad operator/(Quad x, Quad y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }
INLINE Quad operator+(Quad x, float y) { return {x.a + y, x.b + y, x.c + y, x.d + y}; }
INLINE Quad operator-(Quad x, float y) { return {x.a - y, x.b - y, x.c - y, x.d - y}; }
INLINE Quad operator*(Quad x, float y) { return {x.a * y, x.b * y, x.c * y, x.d * y}; }

template <typename F, typename... Quads>
INLINE Quad map(F f, Quads... x) {
  return {f(x.a...), f(x.b...), f(x.c...), f(x.d...)};
}

INLINE Quad load4(const float* from) {
  return {load(from), load(from + LANES), load(from + 2 * LANES), load(from + 3 * LANES)};
}

INLINE void store4(float* to, Quad value) {
  store(to, value.a);
  store(to + LANES, value.b);
  store(to + 2 * LANES, value.c);
  store(to + 3 * LANES, value.d);
}

INLINE Quad at_least(float low, Quad x) {
  return map([low](Vec v) { return larger(broadcast(low), v); }, x);
}

INLINE Quad at_most(float high, Quad x) {
  return map([high](Vec v) { return smaller(broadcast(high), v); }, x);
}

// 2^x for -127 <= x <= 128, relative error 1.5e-7; exactly 0 at -127 and infinite at 128.
INLINE Quad exp2_clipped(Quad x) {
  constexpr float SHIFT = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits
  const Quad shifted = x + SHIFT;
  const Quad f = x - (shifted - SHIFT);
  Quad p = f * 1.3264732e-3f + 9.6715126e-3f;  // minimax of 2^f on [-1/2, 1/2] among those exact at 0
  p = p * f + 5.5507337e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.f;
  return map([](Vec v, Vec exponent) { return (Vec)((Bits)v + ((Bits)exponent << 23)); }, p, shifted);
}

INLINE Quad exp2(Quad x) { return exp2_clipped(at_most(128.f, at_least(-127.f, x))); }

// softplus in units of ln 2, log2(1 + 2^x), relative error 2e-7; sets `e` to 2^-|x|.
INLINE Quad softplus2(Quad x, Quad& e) {
  const Quad minus_abs = map([](Vec v) { return (Vec)((Bits)v | 0x80000000u); }, x);
  e = exp2_clipped(at_least(-127.f, minus_abs));
  Quad p = e * 7.5489912e-3f - 4.2566235e-2f;  // minimax of log2(1 + e) / e on [0, 1]
  p = p * e + 1.1285477e-1f;
  p = p * e - 1.9711773e-1f;
  p = p * e + 2.7564086e-1f;
  p = p * e - 3.5840836e-1f;
  p = p * e + 4.8069296e-1f;
  p = p * e - 7.2134021e-1f;
  p = p * e + 1.4426950f;
  return p * e + at_least(0.f, x);
}

// Derivative of softplus2, 1 / (1 + 2^-x), from the `e` that it computed.
INLINE Quad softplus2_slope(Quad x, Quad e) {
  return map([](Vec x, Vec e) { return x >= 0.f ? broadcast(1.f) : e; }, x, e) / (e + 1.f);
}

// ---- transposition ----

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

// With lanes in blocks of SPAN: `evens` interleaves the even-numbered blocks of a and b, `odds` the odd-numbered ones.
template <int SPAN, int... I>
INLINE Vec evens(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, (I & SPAN ? LANES + I - SPAN : I)...);
}

template <int SPAN, int... I>
INLINE Vec odds(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, (I & SPAN ? LANES + I : I + SPAN)...);
}

// Swaps v[i][j] and v[j][i].
template <int SPAN = LANES / 2>
INLINE void transpose(Vec (&v)[LANES]) {
  constexpr std::make_integer_sequence<int, LANES> lanes;
  for (int i = 0; i < LANES; ++i) {
    if (i & SPAN) continue;
    const Vec a = v[i], b = v[i + SPAN];
    v[i] = evens<SPAN>(a, b, lanes);
    v[i + SPAN] = odds<SPAN>(a, b, lanes);
  }
  if constexpr (SPAN > 1) transpose<SPAN / 2>(v);
}

// Lane i of the result is the sum of the lanes of v[i]. Overwrites v.
template <int SPAN = LANES / 2>
INLINE Vec lane_sums(Vec* v) {
  constexpr std::make_integer_sequence<int, LANES> lanes;
  for (int i = 0; i < SPAN; ++i) v[i] = evens<SPAN>(v[i], v[i + SPAN], lanes) + odds<SPAN>(v[i], v[i + SPAN], lanes);
  if constexpr (SPAN > 1) return lane_sums<SPAN / 2>(v);
  return v[0];
}

INLINE void transpose_square(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride,
                             float scale) {
  Vec v[LANES] = {};
  for (int64_t i = 0; i < rows; ++i) v[i] = load_some(from + i * from_stride, columns) * scale;
  transpose(v);
  for (int64_t i = 0; i < columns; ++i) store_some(to + i * to_stride, v[i], rows);
}

// to[column][row] = scale * from[row][column]; strides in elements.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride,
                      float scale) {
  for (int64_t row = 0; row < rows; row += LANES)
    for (int64_t column = 0; column < columns; column += LANES) {
      const float* const a = from + row * from_stride + column;
      float* const b = to + column * to_stride + row;
      if (row + LANES <= rows && column + LANES <= columns)  // all sizes are constants: stays in registers
        transpose_square(a, from_stride, LANES, LANES, b, to_stride, scale);
      else
        transpose_square(a, from_stride, at_most(rows - row, LANES), at_most(columns - column, LANES), b, to_stride, scale);
    }
}

}  // namespace
