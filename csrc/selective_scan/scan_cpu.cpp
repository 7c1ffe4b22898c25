// The scan for one instruction set. build_tool.py compiles this file once per instruction set; SCAN_VARIANT is its name.
#include "scan_cpu.h"

#include "scan_2d.h"

namespace {

ScanStatus forward(const Scan2dArgs* args) {
  switch (args->type) {
    case SCAN_BFLOAT16: return Scan2d<BFloat16>(*args).forward();
    case SCAN_FLOAT16: return Scan2d<Float16>(*args).forward();
    default: return Scan2d<float>(*args).forward();
  }
}

ScanStatus backward(const Scan2dArgs* args) {
  switch (args->type) {
    case SCAN_BFLOAT16: return Scan2d<BFloat16>(*args).backward();
    case SCAN_FLOAT16: return Scan2d<Float16>(*args).backward();
    default: return Scan2d<float>(*args).backward();
  }
}

}  // namespace

extern const ScanKernels SCAN_VARIANT = {forward, backward};
