// The interface of libviews_cpu.so: renders views of an image from their parameters. Plain C, no threads, no state that a
// caller sees; several threads may call it at once.
#pragma once

#include <stdint.h>

#define VIEWS_ABI_VERSION 1

// The parameters of one view. All fields have 4 bytes, so there is no padding. The operations run in this order: crop, resize
// and window, flip, rotation, elastic distortion, colour jitter, grey, blur, solarise.
struct View {
  int32_t top, left, height, width;        // crop box in the image, pixels
  int32_t resized_height, resized_width;   // the box is resized to this size
  int32_t y, x;                            // where the output window begins in the resized box
  int32_t size;                            // side of the square output window
  int32_t bicubic;                         // 1: antialiased bicubic resize, 0: antialiased bilinear
  int32_t flip;                            // 1: horizontal flip
  int32_t order;                           // index into the permutations of (brightness, contrast, saturation, hue), 0..23
  int32_t jitter;                          // 0: no colour jitter, 1: at its place, 2: before the elastic distortion
  int32_t grey, solarize;                  // 1: grey; 1: invert values from 128
  uint32_t elastic_seed;
  float angle;                             // degrees, counter-clockwise; nearest neighbour, black corners; 0: none
  float elastic_alpha;                     // strength of the elastic distortion; 0: none
  float brightness, contrast, saturation;  // factors, 1: unchanged
  float hue;                               // shift, -0.5..0.5; 0: unchanged
  float blur;                              // standard deviation of the Gaussian blur, pixels, at most 32; 0: none
};

// Exported: int views_abi_version(); const char* views_isa();
//
// int64_t views_render(const uint8_t* image, int64_t height, int64_t width, const View* views, int64_t count,
//                      uint8_t* const* outputs);
// image: [height, width, 3]; outputs: count pointers, each to [3, size, size]. Returns 0; or 1 + the index of the first invalid
// view, before anything is rendered; or -1 if there is not enough memory.
