// Crop, antialiased resize, window and flip, as torchvision's resize(antialias=True) and Pillow's: each output is a weighted
// mean of the inputs below a bicubic (a = -0.5) or triangular filter, which is widened by the scale when it shrinks the image.
//
// Differences: those two round to bytes between the horizontal and the vertical pass. Here the vertical pass comes first, with
// 6 fractional bits, and the horizontal pass has floats. Pixels differ by at most 1 but for sharp edges that overshoot.
#pragma once

#include <math.h>

#include "memory.h"
#include "views.h"

namespace {

constexpr int ROWS = 4;             // rows that the horizontal pass makes at once
constexpr int BLOCK = 4 * SHORTS;   // bytes of a row that the vertical pass takes at once

// The weights of one axis: output i is the sum over k < taps of weights[i * taps + k] * input[first[i] + k].
struct Axis {
  int64_t from, count, taps;
  double scale;   // inputs per output
  double filter;  // stretch of the filter
  int32_t* first;
  float* weights;

  Axis(Arena& arena, int64_t from, int64_t to, int64_t count, bool bicubic) : from(from), count(count) {
    scale = (double)from / to;
    filter = scale > 1 ? scale : 1;
    taps = at_most((int64_t)floor(2 * support(bicubic)) + 1, from);
    first = arena.take<int32_t>(count);
    weights = arena.take<float>(count * taps);
  }

  double support(bool bicubic) const { return (bicubic ? 2 : 1) * filter; }

  void fill(int64_t start, bool bicubic) const {
    for (int64_t i = 0; i < count; ++i) {
      const double centre = (start + i + 0.5) * scale;
      first[i] = (int32_t)clamp((int64_t)floor(centre - support(bicubic) + 0.5), 0, from - taps);
      float* const w = weights + i * taps;
      const float begin = (float)((first[i] + 0.5 - centre) / filter), step = (float)(1 / filter);
      float sum = 0;
      for (int64_t k = 0; k < taps; ++k) {
        const float x = fabsf(begin + k * step);
        const float near = (1.5f * x - 2.5f) * x * x + 1, far = ((-0.5f * x + 2.5f) * x - 4) * x + 2;
        const float cubic = x < 1 ? near : x < 2 ? far : 0, triangle = x < 1 ? 1 - x : 0;
        w[k] = bicubic ? cubic : triangle;
      }
      for (int64_t k = 0; k < taps; ++k) sum += w[k];
      for (int64_t k = 0; k < taps; ++k) w[k] /= sum;
    }
  }
};

struct Resize {
  const View& view;
  Axis vertical, horizontal;
  int64_t row_bytes;  // of the box, a multiple of BLOCK if it is narrower than that
  uint8_t* narrow;    // copy of a box whose rows are shorter than BLOCK
  int16_t* weights;   // of one output row, 14 fractional bits
  int16_t* sums;      // one row after the vertical pass, 6 fractional bits
  float* rows;        // ROWS such rows
  int64_t row_stride;

  Resize(Arena& arena, const View& v)
      : view(v),
        vertical(arena, v.height, v.resized_height, v.size, v.bicubic),
        horizontal(arena, v.width, v.resized_width, v.size, v.bicubic) {
    const bool is_narrow = 3 * v.width < BLOCK;
    row_bytes = is_narrow ? BLOCK : 3 * (int64_t)v.width;
    narrow = arena.take<uint8_t>(is_narrow ? v.height * (int64_t)BLOCK : 0);
    weights = arena.take<int16_t>(vertical.taps);
    sums = arena.take<int16_t>(row_bytes);
    row_stride = row_bytes + 4;  // the horizontal pass reads one number past the last pixel
    rows = arena.take<float>(ROWS * row_stride);
  }

  // image: [height, width of the image, 3] -> pixels [size, size], and up to ROWS - 1 meaningless rows after them.
  void run(const uint8_t* image, int64_t image_width, uint32_t* pixels) const {
    vertical.fill(view.y, view.bicubic);
    horizontal.fill(view.x, view.bicubic);
    for (int64_t i = 0; i < horizontal.count * horizontal.taps; ++i) horizontal.weights[i] *= 1.0f / 64;
    int64_t stride = 3 * image_width;
    const uint8_t* box = image + view.top * stride + 3 * (int64_t)view.left;
    if (narrow_bytes()) {
      for (int64_t y = 0; y < view.height; ++y) {
        memset(narrow + y * BLOCK, 0, BLOCK);
        memcpy(narrow + y * BLOCK, box + y * stride, narrow_bytes());
      }
      box = narrow;
      stride = BLOCK;
    }
    memset(rows, 0, ROWS * row_stride * sizeof(float));
    for (int64_t y = 0; y < view.size; y += ROWS) {
      const int64_t count = at_most(ROWS, view.size - y);
      for (int64_t r = 0; r < count; ++r) {
        vertical_pass(box, stride, y + r);
        for (int64_t i = 0; i < row_bytes; ++i) rows[r * row_stride + i] = sums[i];
      }
      horizontal_pass(pixels + y * view.size);
    }
  }

 private:
  int64_t narrow_bytes() const { return 3 * view.width < BLOCK ? 3 * (int64_t)view.width : 0; }

  // The weights of output row `y` as fixed-point numbers whose sum is exactly 1.
  void quantise(int64_t y) const {
    const float* const exact = vertical.weights + y * vertical.taps;
    int64_t largest = 0, rest = 1 << 14;
    for (int64_t k = 0; k < vertical.taps; ++k) {
      weights[k] = (int16_t)lrintf(exact[k] * (1 << 14));
      rest -= weights[k];
      if (exact[k] > exact[largest]) largest = k;
    }
    weights[largest] = (int16_t)(weights[largest] + rest);
  }

  void vertical_pass(const uint8_t* box, int64_t stride, int64_t y) const {
    quantise(y);
    const uint8_t* const source = box + vertical.first[y] * stride;
    for (int64_t begin = 0; begin < row_bytes; begin += BLOCK) {
      const int64_t i = at_most(begin, row_bytes - BLOCK);  // the last block overlaps the one before it
      ShortVec sum[4] = {};
      for (int64_t k = 0; k < vertical.taps; ++k) {
        const ShortVec weight = weights[k] - ShortVec{};
        const uint8_t* const bytes = source + k * stride + i;
        for (int j = 0; j < 4; ++j) sum[j] += multiply(load_bytes(bytes + j * SHORTS) << 7, weight);
      }
      for (int j = 0; j < 4; ++j) store(sums + i + j * SHORTS, sum[j]);
    }
  }

  void horizontal_pass(uint32_t* pixels) const {
    const int64_t taps = horizontal.taps, size = view.size;
    for (int64_t x = 0; x < size; ++x) {
      const float* const w = horizontal.weights + x * taps;
      const float* const source = rows + 3 * (int64_t)horizontal.first[x];
      Float4 sum[ROWS] = {};
#pragma GCC unroll 4
      for (int64_t k = 0; k < taps; ++k) {
        const Float4 weight = w[k] - Float4{};
        for (int r = 0; r < ROWS; ++r) sum[r] += weight * load<Float4>(source + r * row_stride + 3 * k);
      }
      uint32_t column[ROWS];
      round_pixels(sum, column);
      const int64_t target = view.flip ? size - 1 - x : x;
      for (int r = 0; r < ROWS; ++r) pixels[r * size + target] = column[r];
    }
  }
};

}  // namespace
