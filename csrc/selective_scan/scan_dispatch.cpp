// The functions that Python calls. The instruction set is chosen once, when the library is loaded: the widest that this
// processor supports, or for tests the one in the environment variable SCAN_ISA (avx512, avx2 or baseline; if the processor
// does not support it, baseline).
#include <stdlib.h>
#include <string.h>

#include "scan_cpu.h"

extern const ScanKernels baseline;
#if defined(__x86_64__)
extern const ScanKernels avx2, avx512;
#endif

namespace {

struct Variant {
  const char* name;
  const ScanKernels* kernels;
};

#if defined(__x86_64__)
Variant choose() {
  __builtin_cpu_init();
  const char* wanted = getenv("SCAN_ISA");
  const auto may_be = [wanted](const char* name) { return !wanted || !*wanted || !strcmp(wanted, name); };
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // F16C is older than both
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

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int scan_abi_version() { return SCAN_ABI_VERSION; }

// The instruction set in use.
EXPORT const char* scan_isa() { return variant.name; }

EXPORT int scan_forward_2d(const Scan2dArgs* args) { return variant.kernels->forward(args); }
EXPORT int scan_backward_2d(const Scan2dArgs* args) { return variant.kernels->backward(args); }
