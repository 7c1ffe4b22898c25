// Scratch memory that is kept between calls, so that rendering allocates nothing once it has seen its largest view.
#pragma once

#include <stdlib.h>

#include "simd.h"

namespace {

// Hands out 64-byte aligned pieces of one block. With a null base it only counts: `used` is then the size to allocate.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* const piece = (T*)((uintptr_t)base + used);
    used += round_up(count * (int64_t)sizeof(T), 64);
    return piece;
  }
};

// A block that grows.
class Scratch {
  char* base = nullptr;
  int64_t size = 0;

 public:
  // At least `bytes` of memory, valid until the next call; null if there is not enough.
  char* reserve(int64_t bytes) {
    if (bytes > size) {
      free(base);
      base = (char*)aligned_alloc(64, round_up(bytes, 64));
      size = base ? bytes : 0;
    }
    return base;
  }
  ~Scratch() { free(base); }
};

}  // namespace
