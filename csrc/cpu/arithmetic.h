// What the inner loops share: rounding, clamping, and how many terms to add in float32.
#pragma once

#include <math.h>
#include <stdint.h>

#include "kernels.h"

namespace ttaq {

// To the nearest integer, halves to even.
static inline float nearest(float value) {
#if defined(__x86_64__) && !defined(__SSE4_1__)
  // No instruction: adding 2^23 leaves no bit below one.
  const float magnitude = fabsf(value);
  return magnitude < 0x1p23f ? copysignf((magnitude + 0x1p23f) - 0x1p23f, value) : value;
#else
  return rintf(value);
#endif
}

// Comparisons that are false for a NaN hand it on.
static inline float clamp(float value, Range range) {
  value = value < range.low ? range.low : value;
  return value > range.high ? range.high : value;
}

namespace {
// Scale or zero of a row: the same value under every index. (That of columns is a plain pointer.)
struct Same {
  float value;
  explicit Same(const float* values) : value(*values) {}
  float operator[](int64_t) const { return value; }
};
}  // namespace

// As many terms are added in float32 before their sum goes on in float64: as accurate as a sum by pairs, at no cost.
constexpr int64_t TERMS = 16;
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

}  // namespace ttaq
