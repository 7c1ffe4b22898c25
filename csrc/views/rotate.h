// Rotation about the centre, nearest neighbour, black corners: the same arithmetic as Pillow's Image.rotate, so the same pixels.
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

// source, target: pixels [size, size].
void rotate(const uint32_t* source, uint32_t* target, int64_t size, float degrees) {
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
  for (int64_t y = 0; y < size; ++y, row_x += across, row_y += along) {
    for (int64_t i = 0; i < size; ++i) {
      const int32_t x = (row_x + (int32_t)i * along) >> 16, y_in = (row_y - (int32_t)i * across) >> 16;
      const bool inside = (uint32_t)x < (uint32_t)size && (uint32_t)y_in < (uint32_t)size;
      target[y * size + i] = inside ? source[y_in * size + x] : 0;
    }
  }
}

}  // namespace
