// The functions of one instruction set; scan_dispatch.cpp chooses among them.
#pragma once

#include "scan.h"

struct ScanKernels {
  ScanStatus (*forward)(const ScanArgs*);
  ScanStatus (*backward)(const ScanArgs*);
  ScanStatus (*forward_2d)(const Scan2dArgs*);
  ScanStatus (*backward_2d)(const Scan2dArgs*);
  ScanStatus (*arithmetic)(int64_t rank, int64_t states, int64_t with_backward, int64_t elements, int64_t threads);
};
