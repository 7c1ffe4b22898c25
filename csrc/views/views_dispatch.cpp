// The functions that Python calls. The instruction set is chosen once, when the library is loaded: the widest that this
// processor supports, or for tests the one in the environment variable VIEWS_ISA (avx512, avx2 or baseline; if the processor
// does not support it, baseline).
#include <initializer_list>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "views_cpu.h"

extern const ViewsKernels baseline;
#if defined(__x86_64__)
extern const ViewsKernels avx2, avx512;
#endif

namespace {

struct Variant {
  const char* name;
  const ViewsKernels* kernels;
};

#if defined(__x86_64__)
Variant choose() {
  __builtin_cpu_init();
  const char* wanted = getenv("VIEWS_ISA");
  const auto may_be = [wanted](const char* name) { return !wanted || !*wanted || !strcmp(wanted, name); };
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && may_be("avx512")) return {"avx512", &avx512};
  if (has_avx2 && may_be("avx2")) return {"avx2", &avx2};
  return {"baseline", &baseline};
}
#else
Variant choose() { return {"baseline", &baseline}; }
#endif

const Variant variant = choose();

constexpr int32_t MAX_SIZE = 8192;      // the rotation's 16.16 fixed-point coordinates and the buffers stay small
constexpr int32_t MAX_RESIZED = 1 << 24;

bool is_inside(int32_t start, int32_t length, int64_t end) {
  return start >= 0 && length >= 1 && (int64_t)start + length <= end;
}

bool is_valid(const View& v, int64_t height, int64_t width) {
  if (!is_inside(v.top, v.height, height) || !is_inside(v.left, v.width, width)) return false;
  if (v.size > MAX_SIZE || v.resized_height > MAX_RESIZED || v.resized_width > MAX_RESIZED) return false;
  if (!is_inside(v.y, v.size, v.resized_height) || !is_inside(v.x, v.size, v.resized_width)) return false;
  if (v.order < 0 || v.order > 23 || v.jitter < 0 || v.jitter > 2) return false;
  for (const float value : {v.angle, v.elastic_alpha, v.brightness, v.contrast, v.saturation}) {
    if (!(fabsf(value) <= 1e6f)) return false;  // NaN and infinity too
  }
  return fabsf(v.hue) <= 0.5f && v.blur >= 0 && v.blur <= 32;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int views_abi_version() { return VIEWS_ABI_VERSION; }

// The instruction set in use.
EXPORT const char* views_isa() { return variant.name; }

EXPORT int64_t views_render(const uint8_t* image, int64_t height, int64_t width, const View* views, int64_t count,
                            uint8_t* const* outputs) {
  for (int64_t i = 0; i < count; ++i) {
    if (!is_valid(views[i], height, width)) return i + 1;
  }
  return variant.kernels->render(image, width, views, count, outputs) ? 0 : -1;
}
