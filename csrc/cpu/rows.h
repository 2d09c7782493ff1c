// The loops over a row of activations that kernels.cpp compiles for each instruction set.
#pragma once

#include "kernels.h"
#include "number.h"

namespace ttaq {
namespace {

// Maps the bits of a float to an int in the order of the numbers, NaN outermost, 0.0 to 0; and back.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

template <class T>
Range extremes(const void* x_, int64_t n) {
  const T* x = (const T*)x_;
  int32_t low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = ordered(int32_t(bits_of(widen(x[i]))));
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  return {float_of(uint32_t(ordered(low))), float_of(uint32_t(ordered(high)))};
}

int32_t total(const uint8_t* codes, int64_t n) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += codes[i];
  return sum;
}

}  // namespace
}  // namespace ttaq
