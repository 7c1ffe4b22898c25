// The functions of one instruction set; scan_dispatch.cpp chooses among them.
#pragma once

#include "scan.h"

struct ScanKernels {
  ScanStatus (*forward)(const Scan2dArgs*);
  ScanStatus (*backward)(const Scan2dArgs*);
};
