// Gaussian blur as in Pillow: three box filters in a row, whose edge taps are fractions (Gwosdek et al., Theoretical
// Foundations of Gaussian Convolution by Extended Box Filtering, 2011). Here the three are one filter, applied once per axis.
// Differences: Pillow rounds to bytes after each of the six passes, and repeats the pixels at the border before each of them,
// here before the first: this changes pixels that are nearer to the border than the filter's radius (6 for a blur of 2 pixels).
#pragma once

#include <math.h>

#include "memory.h"

namespace {

constexpr int BLUR_COLUMNS = 2 * SHORTS;  // numbers that a pass makes at once

struct Blur {
  int64_t size, radius;  // of the whole filter
  double box_radius;     // of one box, with its fraction
  int16_t* weights;      // [radius + 1]: from the centre outwards, 15 fractional bits
  int16_t* row;          // one row after the vertical pass with the border repeated, 6 fractional bits
  int16_t* blurred;      // one row after both passes
  const uint8_t** taps;  // rows [2 * radius + 1]

  Blur(Arena& arena, int64_t size, float sigma) : size(size) {
    const double variance = (double)sigma * sigma / 3, length = sqrt(12 * variance + 1);
    const double whole_radius = floor((length - 1) / 2);
    const double fraction = (2 * whole_radius + 1) * (whole_radius * (whole_radius + 1) - 3 * variance) /
                            (6 * (variance - (whole_radius + 1) * (whole_radius + 1)));
    box_radius = whole_radius + fraction;
    radius = 3 * ((int64_t)whole_radius + 1);
    weights = arena.take<int16_t>(radius + 1);
    row = arena.take<int16_t>(round_up(size, BLUR_COLUMNS) + 2 * radius);
    blurred = arena.take<int16_t>(round_up(size, BLUR_COLUMNS));
    taps = arena.take<const uint8_t*>(2 * radius + 1);
  }

  // source: one channel [size, size], readable for BLUR_COLUMNS bytes past its end; target: the same size.
  void run(const uint8_t* source, uint8_t* target) const {
    const int64_t padded = round_up(size, BLUR_COLUMNS);
    memset(row + radius + padded, 0, radius * sizeof(int16_t));  // the horizontal pass reads it for columns after the last
    for (int64_t y = 0; y < size; ++y) {
      for (int64_t k = -radius; k <= radius; ++k) taps[k + radius] = source + clamp(y + k, 0, size - 1) * size;
      for (int64_t x = 0; x < padded; x += BLUR_COLUMNS) vertical_pass(x);
      for (int64_t k = 0; k < radius; ++k) {
        row[k] = row[radius];
        row[radius + size + k] = row[radius + size - 1];
      }
      for (int64_t x = 0; x < padded; x += BLUR_COLUMNS) horizontal_pass(x);
      for (int64_t x = 0; x < size; ++x) {
        const int16_t value = (int16_t)((blurred[x] + 32) >> 6);
        target[y * size + x] = (uint8_t)(value < 255 ? value : 255);
      }
    }
  }

  // The three boxes convolved; the weights sum to 1.
  void make_weights() const {
    constexpr int LIMIT = 128;  // more than 3 * (box radius + 1) for the largest blur
    double kernel[2 * LIMIT + 1] = {}, next[2 * LIMIT + 1];
    const int whole_radius = (int)(radius / 3 - 1), centre = (int)radius;
    const double length = 2 * box_radius + 1, edge = box_radius - whole_radius;
    kernel[centre] = 1;
    for (int pass = 0; pass < 3; ++pass) {
      for (int i = 0; i <= 2 * centre; ++i) {
        double sum = 0;
        for (int k = -whole_radius - 1; k <= whole_radius + 1; ++k) {
          const double share = k < -whole_radius || k > whole_radius ? edge : 1;
          if (i + k >= 0 && i + k <= 2 * centre) sum += share * kernel[i + k];
        }
        next[i] = sum / length;
      }
      memcpy(kernel, next, sizeof kernel);
    }
    int64_t rest = 1 << 15;
    for (int64_t k = radius; k > 0; --k) {
      weights[k] = (int16_t)lrint(kernel[centre + k] * (1 << 15));
      rest -= 2 * weights[k];
    }
    weights[0] = (int16_t)at_most(rest, INT16_MAX);
  }

 private:
  // The sum of a row and the pairs of rows around it, weighted. `shift` brings a sum of two numbers to 15 bits.
  template <typename Source>
  INLINE void weighted_sum(Source source, int shift, int16_t* target) const {
    ShortVec sum[2];
    for (int j = 0; j < 2; ++j) sum[j] = multiply(source(0, j) << shift, weights[0] - ShortVec{});
    for (int64_t k = 1; k <= radius; ++k) {
      const ShortVec weight = weights[k] - ShortVec{};
      for (int j = 0; j < 2; ++j) sum[j] += multiply((source(k, j) + source(-k, j)) << shift, weight);
    }
    for (int j = 0; j < 2; ++j) store(target + j * SHORTS, sum[j]);
  }

  void vertical_pass(int64_t x) const {
    weighted_sum([&](int64_t k, int j) { return load_bytes(taps[radius + k] + x + j * SHORTS); }, 6, row + radius + x);
  }

  void horizontal_pass(int64_t x) const {
    weighted_sum([&](int64_t k, int j) { return load<ShortVec>(row + radius + x + k + j * SHORTS); }, 0, blurred + x);
  }
};

}  // namespace
