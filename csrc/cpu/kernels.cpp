// The inner loops. This file is compiled once for each instruction set, with TTAQ_LEVEL naming the table it fills;
// nothing in it may be inline with external linkage, lest the linker keep one instruction set's copy for all.
#include "kernels.h"

#include <math.h>

#include "number.h"

namespace ttaq {
namespace {

// Scale or zero of a row: the same value under every index. (That of a line is a plain pointer.)
struct Same {
  float value;
  explicit Same(const float* values) : value(*values) {}
  float operator[](int64_t) const { return value; }
};

// Comparisons that are false for a NaN hand it on.
inline float clamp(float value, Range range) {
  value = value < range.low ? range.low : value;
  return value > range.high ? range.high : value;
}

template <class T, class Parameter>
void forward(const void* x_, void* y_, int64_t n, const float* scale_, const float* zero_, Range range) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
  const Parameter scale(scale_), zero(zero_);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float code = clamp(rintf(widen(x[i]) / scale[i]) + zero[i], range);
    narrow((code - zero[i]) * scale[i], y[i]);
  }
}

// What one element gives to the gradients of its scale and zero, and whether its own gradient passes.
struct Terms {
  float dscale, dzero;
  bool inside;
};

inline Terms terms(float grad, float x, float scale, float zero, Range range) {
  const float quotient = x / scale;
  const float rounded = rintf(quotient);
  const float code = rounded + zero;
  const bool inside = (code >= range.low) & (code <= range.high);
  return {grad * (inside ? rounded - quotient : clamp(code, range) - zero), grad * (inside ? 0.0f : -scale), inside};
}

template <class T>
inline T pass(T grad, bool inside) {
  T zero = {};
  return inside ? grad : zero;
}

template <>
inline bfloat16 pass(bfloat16 grad, bool inside) {
  return {uint16_t(inside ? grad.bits : 0)};
}

template <>
inline float16 pass(float16 grad, bool inside) {
  return {uint16_t(inside ? grad.bits : 0)};
}

// float32 lanes over short blocks, their sums in float64: as accurate as a sum by pairs, at no cost.
constexpr int64_t BLOCK = 1024;

template <class T>
void backward_row(const void* grad_, const void* x_, void* dx_, int64_t n, const float* scale_, const float* zero_,
                  Range range, float* dscale, float* dzero) {
  const float scale = *scale_, zero = *zero_;
  double sum_scale = 0, sum_zero = 0;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const T *grad = (const T*)grad_ + start, *x = (const T*)x_ + start;
    T* dx = (T*)dx_ + start;
    const int64_t size = n - start < BLOCK ? n - start : BLOCK;
    float block_scale = 0, block_zero = 0;
#pragma omp simd reduction(+ : block_scale, block_zero)
    for (int64_t i = 0; i < size; ++i) {
      const Terms term = terms(widen(grad[i]), widen(x[i]), scale, zero, range);
      dx[i] = pass(grad[i], term.inside);
      block_scale += term.dscale;
      block_zero += term.dzero;
    }
    sum_scale += block_scale;
    sum_zero += block_zero;
  }
  *dscale += float(sum_scale);
  *dzero += float(sum_zero);
}

template <class T>
void backward_line(const void* grad_, const void* x_, void* dx_, int64_t n, const float* scale, const float* zero,
                   Range range, float* dscale, float* dzero) {
  const T *grad = (const T*)grad_, *x = (const T*)x_;
  T* dx = (T*)dx_;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Terms term = terms(widen(grad[i]), widen(x[i]), scale[i], zero[i], range);
    dx[i] = pass(grad[i], term.inside);
    dscale[i] += term.dscale;
    dzero[i] += term.dzero;
  }
}

template <class T, class Parameter>
int64_t codes(const void* x_, uint8_t* code, int64_t n, const float* scale_, const float* zero_, Range range) {
  const T* x = (const T*)x_;
  const Parameter scale(scale_), zero(zero_);
  int64_t nonfinite = 0;
#pragma omp simd reduction(+ : nonfinite)
  for (int64_t i = 0; i < n; ++i) {
    const float value = widen(x[i]);
    nonfinite += fabsf(value) <= 3.402823466e38f ? 0 : 1;
    const float sum = rintf(value / scale[i]) + zero[i];
    code[i] = uint8_t(int32_t(clamp(sum == sum ? sum : zero[i], range)));
  }
  return nonfinite;
}

// Eight codes fill BITS bytes exactly, so a row is packed eight by eight and its rest bit by bit.
template <int BITS>
void pack(const uint8_t* code, uint8_t* word, int64_t n) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  const int64_t groups = n / 8;
#pragma omp simd
  for (int64_t g = 0; g < groups; ++g) {
    uint32_t stream = 0;
    for (int j = 0; j < 8; ++j) stream |= (code[8 * g + j] & mask) << (BITS * j);
    for (int b = 0; b < BITS; ++b) word[BITS * g + b] = uint8_t(stream >> (8 * b));
  }
  uint32_t stream = 0;
  for (int64_t j = 8 * groups; j < n; ++j) stream |= (code[j] & mask) << (BITS * (j - 8 * groups));
  const int64_t bytes = (n * BITS + 7) / 8;
  for (int64_t b = BITS * groups; b < bytes; ++b, stream >>= 8) word[b] = uint8_t(stream);
}

template <int BITS>
void unpack(const uint8_t* word, uint8_t* code, int64_t n) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  const int64_t groups = n / 8;
#pragma omp simd
  for (int64_t g = 0; g < groups; ++g) {
    uint32_t stream = 0;
    for (int b = 0; b < BITS; ++b) stream |= uint32_t(word[BITS * g + b]) << (8 * b);
    for (int j = 0; j < 8; ++j) code[8 * g + j] = uint8_t((stream >> (BITS * j)) & mask);
  }
  uint32_t stream = 0;
  const int64_t bytes = (n * BITS + 7) / 8;
  for (int64_t b = BITS * groups; b < bytes; ++b) stream |= uint32_t(word[b]) << (8 * (b - BITS * groups));
  for (int64_t j = 8 * groups; j < n; ++j, stream >>= BITS) code[j] = uint8_t(stream & mask);
}

void copy(const uint8_t* from, uint8_t* to, int64_t n) { memcpy(to, from, size_t(n)); }

}  // namespace

#define FOR_EACH_DTYPE(loop) {loop<float>, loop<bfloat16>, loop<float16>}
#define FOR_EACH_SPAN(loop)                                              \
  {                                                                      \
    {loop<float, Same>, loop<bfloat16, Same>, loop<float16, Same>}, {    \
      loop<float, const float*>, loop<bfloat16, const float*>, loop<float16, const float*> \
    }                                                                    \
  }

const Kernels TTAQ_LEVEL = {
    FOR_EACH_SPAN(forward),
    {FOR_EACH_DTYPE(backward_row), FOR_EACH_DTYPE(backward_line)},
    FOR_EACH_SPAN(codes),
    {nullptr, nullptr, pack<2>, pack<3>, pack<4>, nullptr, nullptr, nullptr, copy},
    {nullptr, nullptr, unpack<2>, unpack<3>, unpack<4>, nullptr, nullptr, nullptr, copy},
};

}  // namespace ttaq
