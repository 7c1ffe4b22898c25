// Renders views with one instruction set. build_tool.py compiles this file once per instruction set; VIEWS_VARIANT is its name.
#include "views_cpu.h"

#include "blur.h"
#include "colour.h"
#include "elastic.h"
#include "resize.h"
#include "rotate.h"

namespace {

// The buffers of one view, and the operations on them. A pixel is 4 bytes until the last colour operation; then the image is
// three planes of bytes.
struct Renderer {
  const View& view;
  int64_t count;  // pixels
  Resize resize;
  Elastic elastic;
  Blur blur;
  uint32_t *pixels, *spare;
  int32_t* indices;  // of one row
  uint8_t* planes;  // before the blur

  Renderer(Arena& arena, const View& v)
      : view(v),
        count((int64_t)v.size * v.size),
        resize(arena, v),
        elastic(arena, v.elastic_alpha != 0 ? v.size : 0),
        blur(arena, v.size, v.blur) {
    pixels = arena.take<uint32_t>(count + (ROWS - 1) * v.size);
    spare = arena.take<uint32_t>(count);
    indices = arena.take<int32_t>(v.size);
    planes = arena.take<uint8_t>(view.blur > 0 ? 3 * count + BLUR_COLUMNS : 0);
  }

  // output: [3, size, size].
  void run(const uint8_t* image, int64_t width, uint8_t* output) {
    resize.run(image, width, pixels);
    if (view.angle != 0) {
      rotate(pixels, spare, indices, view.size, view.angle);
      swap();
    }
    if (view.jitter == 2) Jitter(view).run(pixels, count, [&](const Pixels& chunk, int64_t i) { chunk.write(pixels + i); });
    if (view.elastic_alpha != 0) {
      elastic.run(pixels, spare, view.elastic_seed, view.elastic_alpha);
      swap();
    }
    uint8_t* const target = view.blur > 0 ? planes : output;
    if (view.jitter == 1) {
      Jitter(view).run(pixels, count, [&](Pixels& chunk, int64_t i) { finish(chunk, target + i); });
    } else {
      split(target);
    }
    if (view.blur > 0) blur_planes(output);
    if (view.solarize) {
      for (int64_t i = 0; i < 3 * count; ++i) output[i] = output[i] < 128 ? output[i] : (uint8_t)(255 - output[i]);
    }
  }

 private:
  void swap() {
    uint32_t* const other = spare;
    spare = pixels;
    pixels = other;
  }

  // Pixels to planes, without colour jitter.
  void split(uint8_t* target) const {
    Pixels chunk;
    for (int64_t i = 0; i < count; i += CHUNK) {
      chunk.count = (int)at_most(CHUNK, count - i);
      chunk.read(pixels + i);
      finish(chunk, target + i);
    }
  }

  // Grey, and from whole numbers to bytes. target: where the chunk begins in the first plane.
  void finish(Pixels& chunk, uint8_t* target) const {
    if (view.grey) {
      for (int i = 0; i < chunk.count; ++i) chunk.r[i] = grey_value(chunk.r[i], chunk.g[i], chunk.b[i]);
    }
    const float* const channels[3] = {chunk.r, view.grey ? chunk.r : chunk.g, view.grey ? chunk.r : chunk.b};
    for (int c = 0; c < 3; ++c) {
      const float* const channel = channels[c];
      uint8_t* __restrict const plane = target + c * count;
      const int n = chunk.count;  // a copy, because the compiler must assume that `plane` overwrites it
      for (int i = 0; i < n; ++i) plane[i] = (uint8_t)(int32_t)channel[i];
    }
  }

  void blur_planes(uint8_t* output) const {
    blur.make_weights();
    memset(planes + 3 * count, 0, BLUR_COLUMNS);
    blur.run(planes, output);
    for (int c = 1; c < 3; ++c) {
      if (view.grey) {
        memcpy(output + c * count, output, count);
      } else {
        blur.run(planes + c * count, output + c * count);
      }
    }
  }
};

bool render(const uint8_t* image, int64_t width, const View* views, int64_t count, uint8_t* const* outputs) {
  thread_local Scratch scratch;
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    Arena arena = {nullptr};
    Renderer(arena, views[i]);
    bytes = at_least(bytes, arena.used);
  }
  char* const memory = scratch.reserve(bytes);
  if (!memory && bytes) return false;
  for (int64_t i = 0; i < count; ++i) {
    Arena arena = {memory};
    Renderer(arena, views[i]).run(image, width, outputs[i]);
  }
  return true;
}

}  // namespace

extern const ViewsKernels VIEWS_VARIANT;
const ViewsKernels VIEWS_VARIANT = {render};
