// Rotation about the centre, nearest neighbour, black corners: the arithmetic of Pillow's Image.rotate, so the same pixels.
#pragma once

#include <math.h>

#include "simd.h"

namespace {

// Quarter turns, counter-clockwise: 1, 2 or 3.
void quarter_turns(const uint32_t* source, uint32_t* target, int64_t size, int turns) {
  for (int64_t y = 0; y < size; ++y) {
    for (int64_t x = 0; x < size; ++x) {
      const int64_t mirrored_x = size - 1 - x, mirrored_y = size - 1 - y;
      const int64_t row = turns == 1 ? x : turns == 2 ? mirrored_y : mirrored_x;
      const int64_t column = turns == 1 ? mirrored_y : turns == 2 ? mirrored_x : y;
      target[y * size + x] = source[row * size + column];
    }
  }
}

// source, target: pixels [size, size]; source has room for one more pixel, which is overwritten. index: [size].
void rotate(uint32_t* source, uint32_t* target, int32_t* __restrict index, int64_t size, float degrees) {
  double angle = fmod((double)degrees, 360);
  if (angle < 0) angle += 360;
  if (angle == 90 || angle == 180 || angle == 270) return quarter_turns(source, target, size, (int)(angle / 90));

  const double radians = -angle * (M_PI / 180);
  const double cosine = rint(cos(radians) * 1e15) / 1e15, sine = rint(sin(radians) * 1e15) / 1e15;  // as Pillow does
  const double centre = size / 2.0;
  const auto fixed = [](double value) { return (int32_t)floor(value * 65536 + 0.5); };  // 16 fractional bits
  const int32_t along = fixed(cosine), across = fixed(sine);
  int32_t row_x = fixed(centre - centre * (cosine + sine) + 0.5 * (cosine + sine));
  int32_t row_y = fixed(centre - centre * (cosine - sine) + 0.5 * (cosine - sine));
  const int32_t side = (int32_t)size, outside = side * side;
  source[outside] = 0;
  for (int64_t y = 0; y < size; ++y, row_x += across, row_y += along) {
    for (int32_t i = 0; i < side; ++i) {
      const uint32_t x = (uint32_t)((row_x + i * along) >> 16), y_in = (uint32_t)((row_y - i * across) >> 16);
      const bool is_inside = (x < (uint32_t)side) & (y_in < (uint32_t)side);
      index[i] = is_inside ? (int32_t)y_in * side + (int32_t)x : outside;
    }
    for (int32_t i = 0; i < side; ++i) target[y * size + i] = source[index[i]];
  }
}

}  // namespace
