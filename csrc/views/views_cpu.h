// The functions of one instruction set; views_dispatch.cpp chooses among them.
#pragma once

#include "views.h"

struct ViewsKernels {
  // Renders valid views; returns whether there was enough memory.
  bool (*render)(const uint8_t* image, int64_t width, const View* views, int64_t count, uint8_t* const* outputs);
};
