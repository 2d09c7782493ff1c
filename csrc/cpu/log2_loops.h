// The loops of the logarithmic grid (kernels/log2.py). Part of kernels.cpp: each instruction set compiles its own copy.
#pragma once

#include <math.h>
#include <stdint.h>

#include "arithmetic.h"
#include "number.h"

namespace ttaq {

// x / scale, cut to where a code can still tell values apart; a NaN stays.
static inline float log2_ratio(float x, float scale) {
  float ratio = x / scale;
  ratio = ratio < 0x1p-100f ? 0x1p-100f : ratio;
  return ratio > 2.0f ? 2.0f : ratio;
}

// round(-ROOTS log2(ratio)): the exponent, and the powers of 2^(1/4) that the mantissa exceeds.
template <int ROOTS>
static inline int32_t log2_code(float ratio) {
  const int32_t bits = int32_t(bits_of(ratio)), octave = 127 - (bits >> 23), mantissa = bits & 0x7fffff;
  if (ROOTS == 1) return octave - (mantissa > 0x3504f3 ? 1 : 0);
  return 2 * octave - (mantissa > 0x1837f0 ? 1 : 0) - (mantissa > 0x5744fc ? 1 : 0);
}

static inline int32_t log2_cut(int32_t raw, int32_t qmax) {
  raw = raw < 0 ? 0 : raw;
  return raw > qmax ? qmax : raw;
}

template <int ROOTS>
static inline float log2_value(int32_t code, int32_t qmax, float scale) {
  float level = float_of(uint32_t(127 - code / ROOTS) << 23);
  if (ROOTS == 2) level *= code & 1 ? 0x1.6a09e6p-1f : 1.0f;
  return (code == qmax ? 0.0f : level) * scale;
}

template <int ROOTS, class T>
static void log2_forward(const void* x_, void* y_, int64_t n, float scale, int32_t qmax) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float ratio = log2_ratio(widen(x[i]), scale);
    const float value = log2_value<ROOTS>(log2_cut(log2_code<ROOTS>(ratio), qmax), qmax, scale);
    narrow(ratio == ratio ? value : ratio, y[i]);
  }
}

template <int ROOTS, class T>
static int64_t log2_codes(const void* x_, uint8_t* codes, int64_t n, float scale, int32_t qmax) {
  const T* x = (const T*)x_;
  int64_t nonfinite = 0;
#pragma omp simd reduction(+ : nonfinite)
  for (int64_t i = 0; i < n; ++i) {
    const float value = widen(x[i]);
    nonfinite += fabsf(value) <= 3.402823466e38f ? 0 : 1;
    const int32_t code = log2_cut(log2_code<ROOTS>(log2_ratio(value, scale)), qmax);
    codes[i] = uint8_t(value == value ? code : qmax);
  }
  return nonfinite;
}

// Returns the sum of what the elements give to the scale.
template <int ROOTS, class T>
static double log2_backward(const void* grad_, const void* x_, void* dx_, int64_t n, float scale, int32_t qmax) {
  double total = 0;
  for (int64_t start = 0; start < n; start += TERMS * LANES) {
    const T *grad = (const T*)grad_ + start, *x = (const T*)x_ + start;
    T* dx = (T*)dx_ + start;
    const int64_t size = n - start < TERMS * LANES ? n - start : TERMS * LANES;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
      const float value = widen(x[i]), upstream = widen(grad[i]), ratio = log2_ratio(value, scale);
      const int32_t raw = log2_code<ROOTS>(ratio), code = log2_cut(raw, qmax);
      const float slope = log2_value<ROOTS>(code, qmax, scale) / value, above = raw < 0 ? upstream : 0.0f;
      const float passed = (code == raw) & (code < qmax) ? upstream * slope : 0.0f;
      narrow(ratio == ratio ? passed : 0.0f, dx[i]);
      sum += ratio == ratio ? above : ratio;
    }
    total += sum;
  }
  return total;
}

}  // namespace ttaq
