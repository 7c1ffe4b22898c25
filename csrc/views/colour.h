// Colour jitter and grey, with Pillow's arithmetic: values are whole numbers after every operation, hue and saturation too. So
// the results are Pillow's but for roundings of single pixels.
#pragma once

#include <initializer_list>

#include "simd.h"
#include "views.h"

namespace {

constexpr int CHUNK = 512;  // pixels that go through several operations while they stay in the first-level cache

enum Operation { BRIGHTNESS, CONTRAST, SATURATION, HUE };

// The permutations in the order of itertools.permutations((0, 1, 2, 3)).
constexpr uint8_t ORDERS[24][4] = {
    {0, 1, 2, 3}, {0, 1, 3, 2}, {0, 2, 1, 3}, {0, 2, 3, 1}, {0, 3, 1, 2}, {0, 3, 2, 1}, {1, 0, 2, 3}, {1, 0, 3, 2},
    {1, 2, 0, 3}, {1, 2, 3, 0}, {1, 3, 0, 2}, {1, 3, 2, 0}, {2, 0, 1, 3}, {2, 0, 3, 1}, {2, 1, 0, 3}, {2, 1, 3, 0},
    {2, 3, 0, 1}, {2, 3, 1, 0}, {3, 0, 1, 2}, {3, 0, 2, 1}, {3, 1, 0, 2}, {3, 1, 2, 0}, {3, 2, 0, 1}, {3, 2, 1, 0},
};

INLINE float smaller(float a, float b) { return a < b ? a : b; }
INLINE float larger(float a, float b) { return a > b ? a : b; }
INLINE float whole(float value) { return (float)(int32_t)value; }  // towards zero

INLINE float grey_value(float r, float g, float b) {
  return whole((r * 19595 + g * 38470 + b * 7471 + 32768) * 0x1p-16f);  // exact: the sums have at most 24 bits
}

// The point at `factor` on the line from `origin` (factor 0) through `value` (factor 1), limited to 0..255.
INLINE float blend(float origin, float value, float factor) {
  const int32_t blended = (int32_t)(origin + factor * (value - origin));
  const int32_t at_least_0 = blended > 0 ? blended : 0;
  return (float)(at_least_0 < 255 ? at_least_0 : 255);
}

struct Pixels {
  int count;
  float r[CHUNK], g[CHUNK], b[CHUNK];

  NOINLINE void read(const uint32_t* pixels) {
    for (int i = 0; i < count; ++i) {
      r[i] = (float)(int32_t)(pixels[i] & 255);
      g[i] = (float)(int32_t)(pixels[i] >> 8 & 255);
      b[i] = (float)(int32_t)(pixels[i] >> 16 & 255);
    }
  }

  NOINLINE void write(uint32_t* __restrict pixels) const {
    const int n = count;  // a copy, because the compiler must assume that `pixels` overwrites `count`
    for (int i = 0; i < n; ++i) pixels[i] = (uint32_t)((int32_t)r[i] | (int32_t)g[i] << 8 | (int32_t)b[i] << 16);
  }

  NOINLINE int64_t sum_of_greys() const {
    int32_t sum = 0;
    for (int i = 0; i < count; ++i) sum += (int32_t)grey_value(r[i], g[i], b[i]);
    return sum;
  }

  // Brightness: origin 0. Contrast: the mean grey value of the image.
  NOINLINE void blend_with(float origin, float factor) {
    for (float* const channel : {r, g, b}) {
      for (int i = 0; i < count; ++i) channel[i] = blend(origin, channel[i], factor);
    }
  }

  NOINLINE void saturation(float factor) {
    for (int i = 0; i < count; ++i) {
      const float grey = grey_value(r[i], g[i], b[i]);
      r[i] = blend(grey, r[i], factor);
      g[i] = blend(grey, g[i], factor);
      b[i] = blend(grey, b[i], factor);
    }
  }

  // shift: 0..255, a full turn is 256.
  NOINLINE void hue(float shift) {
    for (int i = 0; i < count; ++i) {
      const float value = larger(r[i], larger(g[i], b[i])), range = value - smaller(r[i], smaller(g[i], b[i]));
      const float divisor = larger(range, 1);
      const bool is_red = r[i] == value, is_green = g[i] == value;
      const float ahead = is_red ? g[i] : is_green ? b[i] : r[i], behind = is_red ? b[i] : is_green ? r[i] : g[i];
      float turn = ((is_red ? 0.0f : is_green ? 2.0f : 4.0f) + (ahead - behind) / divisor) / 6;
      turn = turn < 0 ? turn + 1 : turn;
      float angle = whole(turn * 255) + shift;
      angle = (angle >= 256 ? angle - 256 : angle) * (6 / 255.0f);  // 0..6
      const float colour = value * whole(range / larger(value, 1) * 255) * (1 / 255.0f);  // value times saturation
      r[i] = channel_of(value, colour, angle, 5);
      g[i] = channel_of(value, colour, angle, 3);
      b[i] = channel_of(value, colour, angle, 1);
    }
  }

 private:
  // One channel of a colour with the hue `angle`; offset: 5 red, 3 green, 1 blue.
  INLINE static float channel_of(float value, float colour, float angle, float offset) {
    float position = angle + offset;
    position = position >= 6 ? position - 6 : position;
    return whole(value - colour * larger(smaller(smaller(position, 4 - position), 1), 0) + 0.5f);
  }
};

struct Jitter {
  const View& view;
  const uint8_t* order;
  float hue_shift;

  explicit Jitter(const View& v) : view(v), order(ORDERS[v.order]) {
    hue_shift = (float)((int)((double)v.hue * 255) & 255);
  }

  // Runs all operations on the pixels and leaves the last ones to `finish`, which is called for each chunk.
  template <typename Finish>
  void run(uint32_t* image, int64_t count, Finish finish) const {
    int contrast = 0;
    while (order[contrast] != CONTRAST) ++contrast;
    Pixels pixels;
    int64_t greys = 0;
    for (int64_t i = 0; i < count; i += CHUNK) {
      pixels.count = (int)at_most(CHUNK, count - i);
      pixels.read(image + i);
      for (int k = 0; k < contrast; ++k) apply(pixels, order[k], 0);
      greys += pixels.sum_of_greys();
      if (contrast) pixels.write(image + i);
    }
    const float mean = (float)(int64_t)((double)greys / (double)count + 0.5);
    for (int64_t i = 0; i < count; i += CHUNK) {
      pixels.count = (int)at_most(CHUNK, count - i);
      pixels.read(image + i);
      for (int k = contrast; k < 4; ++k) apply(pixels, order[k], mean);
      finish(pixels, i);
    }
  }

 private:
  void apply(Pixels& pixels, int operation, float mean_grey) const {
    switch (operation) {
      case BRIGHTNESS: return pixels.blend_with(0, view.brightness);
      case CONTRAST: return pixels.blend_with(mean_grey, view.contrast);
      case SATURATION: return pixels.saturation(view.saturation);
      default:
        if (view.hue != 0) pixels.hue(hue_shift);
    }
  }
};

}  // namespace
