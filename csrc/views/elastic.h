// Elastic distortion: uniform noise per pixel and direction, smoothed by a Gaussian, moves the pixels. Bilinear, black outside;
// the same function as ElasticTransform in augmentations.py.
#pragma once

#include <math.h>

#include "memory.h"

namespace {

constexpr double SIGMA = 5;
constexpr int RADIUS = 20, TAPS = 2 * RADIUS + 1;  // int(8 * sigma + 1) taps
constexpr int COLUMNS = 4 * LANES;                 // numbers that a smoothing pass makes at once

// Chris Wellons' lowbias32: a bijection whose every output bit depends on every input bit.
INLINE uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Numbers in -1..1, a function of the seed and the position alone (elastic_noise in clever/data/rendering.py is the same).
INLINE float noise(uint32_t key, uint32_t index) {
  return (float)(int32_t)(mix(mix(index) ^ key) ^ 0x80000000u) * 0x1p-31f;
}

// Index of the number that padding by reflection puts at `index`, repeatedly if the padding is longer than the numbers.
INLINE int64_t reflect(int64_t index, int64_t size) {
  const int64_t period = at_least(2 * (size - 1), 1), position = ((index % period) + period) % period;
  return at_most(position, period - position);
}

struct Elastic {
  int64_t size, stride;    // of the rows of numbers: a multiple of COLUMNS
  float* taps;             // [TAPS]
  float* padded;           // one row of noise
  float* rows;             // [size, stride]: smoothed along x
  const float** row_taps;  // rows [RADIUS before the first, ..., RADIUS after the last]
  float* field[2];         // [size, stride]: displacements in x and y for alpha 1
  uint32_t* bordered;      // [size + 3, size + 3]: the image with a border; the fourth byte is 255 inside and 0 in the border
  int32_t* index;          // [stride]: top left pixel in `bordered`
  float *part_x, *part_y;  // [stride]: distance from it

  Elastic(Arena& arena, int64_t size) : size(size), stride(round_up(size, COLUMNS)) {
    taps = arena.take<float>(TAPS);
    padded = arena.take<float>(stride + TAPS);
    rows = arena.take<float>(size * stride);
    row_taps = arena.take<const float*>(size + TAPS);
    for (float*& direction : field) direction = arena.take<float>(size * stride);
    bordered = arena.take<uint32_t>((size + 3) * (size + 3));
    index = arena.take<int32_t>(stride);
    part_x = arena.take<float>(stride);
    part_y = arena.take<float>(stride);
  }

  // source, target: pixels [size, size].
  void run(const uint32_t* source, uint32_t* target, uint32_t seed, float alpha) const {
    make_taps();
    const uint32_t key = mix(seed ^ 0x9e3779b9u);
    for (int direction = 0; direction < 2; ++direction) make_field(key, direction);
    const int64_t width = size + 3;
    memset(bordered, 0, width * width * sizeof(uint32_t));
    for (int64_t y = 0; y < size; ++y) {
      for (int64_t x = 0; x < size; ++x) bordered[(y + 1) * width + x + 1] = source[y * size + x] | 0xff000000u;
    }
    for (int64_t y = 0; y < size; ++y) {
      find_sources(y, 0.5f * alpha);
      sample(target + y * size);
    }
  }

 private:
  void make_taps() const {
    double exact[TAPS], sum = 0;
    for (int k = 0; k < TAPS; ++k) sum += exact[k] = exp(-0.5 * (k - RADIUS) * (k - RADIUS) / (SIGMA * SIGMA));
    for (int k = 0; k < TAPS; ++k) taps[k] = (float)(exact[k] / sum);
  }

  void make_field(uint32_t key, int direction) const {
    memset(padded, 0, (stride + TAPS) * sizeof(float));
    for (int64_t y = 0; y < size; ++y) {
      const uint32_t begin = (uint32_t)((direction * size + y) * size);
      float* const numbers = padded + RADIUS;
      const int32_t count = (int32_t)size;
      for (int32_t x = 0; x < count; ++x) numbers[x] = noise(key, begin + (uint32_t)x);
      for (int64_t k = 1; k <= RADIUS; ++k) {
        numbers[-k] = numbers[reflect(-k, size)];
        numbers[size - 1 + k] = numbers[reflect(size - 1 + k, size)];
      }
      smooth(rows + y * stride, [&](int k) { return padded + k; });
    }
    for (int64_t i = 0; i < size + 2 * RADIUS; ++i) row_taps[i] = rows + reflect(i - RADIUS, size) * stride;
    for (int64_t y = 0; y < size; ++y) {
      smooth(field[direction] + y * stride, [&](int k) { return row_taps[y + k]; });
    }
  }

  // target[x] = the sum over k of taps[k] * source(k)[x].
  template <typename Source>
  INLINE void smooth(float* target, Source source) const {
    for (int64_t x = 0; x < stride; x += COLUMNS) {
      Vec sum[4] = {};
      for (int k = 0; k < TAPS; ++k) {
        const Vec weight = taps[k] - Vec{};
        for (int j = 0; j < 4; ++j) sum[j] += weight * load<Vec>(source(k) + x + j * LANES);
      }
      for (int j = 0; j < 4; ++j) store(target + x + j * LANES, sum[j]);
    }
  }

  // Where the pixels of row `y` come from: index, part_x, part_y.
  void find_sources(int64_t y, float scale) const {
    const Vec low = {}, high = (float)(size + 1) - low;
    const Vec row_position = (float)(y + 1) - low;
    Vec column_position;
    for (int j = 0; j < LANES; ++j) column_position[j] = (float)(j + 1);
    for (int64_t x = 0; x < size; x += LANES, column_position += LANES) {
      Vec from_x = column_position + scale * load<Vec>(field[0] + y * stride + x);  // in `bordered`
      Vec from_y = row_position + scale * load<Vec>(field[1] + y * stride + x);
      from_x = from_x < low ? low : from_x > high ? high : from_x;
      from_y = from_y < low ? low : from_y > high ? high : from_y;
      const IntVec column = __builtin_convertvector(from_x, IntVec), row = __builtin_convertvector(from_y, IntVec);
      store(index + x, row * ((int32_t)size + 3) + column);
      store(part_x + x, from_x - __builtin_convertvector(column, Vec));
      store(part_y + x, from_y - __builtin_convertvector(row, Vec));
    }
  }

  void sample(uint32_t* target) const {
    const int64_t width = size + 3;
    for (int64_t x = 0; x < size; x += 4) {
      Float4 values[4] = {};
      for (int j = 0; j < 4; ++j) {
        const int64_t i = at_most(x + j, size - 1);
        const uint32_t* const corner = bordered + index[i];
        const Float4 right = part_x[i] - Float4{}, down = part_y[i] - Float4{};
        const Float4 a = pixel_to_floats(corner[0]), b = pixel_to_floats(corner[1]);
        const Float4 c = pixel_to_floats(corner[width]), d = pixel_to_floats(corner[width + 1]);
        const Float4 above = a + right * (b - a), below = c + right * (d - c);
        values[j] = above + down * (below - above);
        values[j] *= values[j][3] * (1 / 255.0f);  // torchvision fills the border with black once more
      }
      uint32_t pixels[4];
      round_pixels(values, pixels);
      memcpy(target + x, pixels, at_most(4, size - x) * sizeof(uint32_t));
    }
  }
};

}  // namespace
