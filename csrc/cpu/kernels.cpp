// The inner loops. This file and the other *kernels.cpp are compiled once for each instruction set, with TTAQ_LEVEL
// naming it; nothing in them may be inline with external linkage, lest the linker keep one instruction set's copy for
// all.
#include "kernels.h"

#include "../ttaq_native.h"
#include "arithmetic.h"
#include "log2_loops.h"
#include "number.h"
#include "philox.h"
#include "rows.h"

namespace ttaq {
namespace {

template <class T, class Parameter>
void forward(const void* x_, void* y_, Block block, const float* scale_, const float* zero_, Range range) {
  const Parameter scale(scale_), zero(zero_);
  for (int64_t line = 0; line < block.lines; ++line) {
    const T* x = (const T*)x_ + line * block.stride;
    T* y = (T*)y_ + line * block.stride;
#pragma omp simd
    for (int64_t i = 0; i < block.size; ++i) {
      const float code = clamp(nearest(widen(x[i]) / scale[i]) + zero[i], range);
      narrow((code - zero[i]) * scale[i], y[i]);
    }
  }
}

// What one element gives to the gradients of its scale and zero, and whether its own gradient passes.
struct Terms {
  float dscale, dzero;
  bool inside;
};

// What is `kept` as it is passes its gradient and gives nothing.
inline Terms terms(float grad, float x, float scale, float zero, Range range, bool kept = false) {
  const float quotient = x / scale;
  const float rounded = nearest(quotient);
  const float code = kept ? range.low : rounded + zero;
  const bool inside = (code >= range.low) & (code <= range.high);
  const float dscale = grad * (inside ? rounded - quotient : clamp(code, range) - zero);
  return {kept ? 0.0f : dscale, inside ? 0.0f : -grad * scale, inside};
}

inline float pass(float grad, bool inside) { return inside ? grad : 0.0f; }

template <class T>
inline T pass(T grad, bool inside) {
  return {uint16_t(inside ? grad.bits : 0)};
}

template <class T>
void backward_row(const void* grad_, const void* x_, void* dx_, Block block, const float* scale_, const float* zero_,
                  Range range, double* dscale, double* dzero) {
  const float scale = *scale_, zero = *zero_;
  for (int64_t start = 0; start < block.size; start += TERMS * LANES) {
    const T *grad = (const T*)grad_ + start, *x = (const T*)x_ + start;
    T* dx = (T*)dx_ + start;
    const int64_t size = block.size - start < TERMS * LANES ? block.size - start : TERMS * LANES;
    float sum_scale = 0, sum_zero = 0;
#pragma omp simd reduction(+ : sum_scale, sum_zero)
    for (int64_t i = 0; i < size; ++i) {
      const Terms term = terms(widen(grad[i]), widen(x[i]), scale, zero, range);
      dx[i] = pass(grad[i], term.inside);
      sum_scale += term.dscale;
      sum_zero += term.dzero;
    }
    *dscale += sum_scale;
    *dzero += sum_zero;
  }
}

template <class T>
void backward_columns(const void* grad_, const void* x_, void* dx_, Block block, const float* scale,
                      const float* zero, Range range, double* dscale, double* dzero) {
  float sum_scale[WIDTH], sum_zero[WIDTH];
  for (int64_t first = 0; first < block.lines; first += TERMS) {
    for (int64_t i = 0; i < block.size; ++i) sum_scale[i] = sum_zero[i] = 0;
    for (int64_t line = first; line < first + TERMS && line < block.lines; ++line) {
      const T *grad = (const T*)grad_ + line * block.stride, *x = (const T*)x_ + line * block.stride;
      T* dx = (T*)dx_ + line * block.stride;
#pragma omp simd
      for (int64_t i = 0; i < block.size; ++i) {
        const Terms term = terms(widen(grad[i]), widen(x[i]), scale[i], zero[i], range);
        dx[i] = pass(grad[i], term.inside);
        sum_scale[i] += term.dscale;
        sum_zero[i] += term.dzero;
      }
    }
    for (int64_t i = 0; i < block.size; ++i) {
      dscale[i] += sum_scale[i];
      dzero[i] += sum_zero[i];
    }
  }
}

template <class T, class Parameter>
int64_t codes(const void* x_, uint8_t* codes_, Block block, const float* scale_, const float* zero_, Range range) {
  const Parameter scale(scale_), zero(zero_);
  int64_t nonfinite = 0;
  for (int64_t line = 0; line < block.lines; ++line) {
    const T* x = (const T*)x_ + line * block.stride;
    uint8_t* code = codes_ + line * block.stride;
    int32_t bad = 0;
#pragma omp simd reduction(+ : bad)
    for (int64_t i = 0; i < block.size; ++i) {
      const float value = widen(x[i]);
      bad += fabsf(value) <= 3.402823466e38f ? 0 : 1;
      const float sum = nearest(value / scale[i]) + zero[i];
      code[i] = uint8_t(int32_t(clamp(sum == sum ? sum : zero[i], range)));
    }
    nonfinite += bad;
  }
  return nonfinite;
}

// Each of the four words of a call gives two numbers of 16 bits, or the sum of its four bytes; the numbers of one word
// go to CALLS elements that lie together.
template <int KIND>
void draw(uint64_t seed, int64_t block, float* numbers) {
  constexpr int SLOTS = KIND == TTAQ_GAUSS ? 4 : 8;
  uint32_t words[4][CALLS];
  for (int64_t first = block * DRAWN / SLOTS; first < (block + 1) * DRAWN / SLOTS; first += CALLS) {
    philox(seed, uint64_t(first), words);
    for (int slot = 0; slot < SLOTS; ++slot, numbers += CALLS) {
      const uint32_t* word = words[slot * 4 / SLOTS];
#pragma omp simd
      for (int i = 0; i < CALLS; ++i) {
        const uint32_t pairs = (word[i] & 0x00ff00ffu) + ((word[i] >> 8) & 0x00ff00ffu);
        const uint32_t sum = (pairs & 0xffffu) + (pairs >> 16), half = (word[i] >> (slot % 2 * 16)) & 0xffffu;
        numbers[i] = float(int32_t(KIND == TTAQ_GAUSS ? sum : half));
      }
    }
  }
}

constexpr float UNIT = 0x1.bb688cp-8f;  // 1 / sqrt(21845), of unit variance: four bytes have four times 65535 / 12

template <int KIND>
inline float moved(float x, float number, float spread, float scale) {
  if (KIND == TTAQ_STEP) return x + spread * scale * (number * 0x1p-16f - 0.5f);
  if (KIND == TTAQ_GAUSS) return x + spread * ((number - 510.0f) * UNIT);
  return x;
}

template <int KIND>
inline bool kept(float number, float spread) {
  return KIND == TTAQ_DROP && number < spread * 0x1p16f;
}

template <int KIND, class T>
void perturb(const void* x_, void* y_, int64_t n, const float* numbers, const float* spreads, float scale, float zero,
             Range range) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float value = widen(x[i]);
    const float code = clamp(nearest(moved<KIND>(value, numbers[i], spreads[i], scale) / scale) + zero, range);
    narrow(kept<KIND>(numbers[i], spreads[i]) ? value : (code - zero) * scale, y[i]);
  }
}

template <int KIND, class T>
void perturb_backward(const void* grad_, const void* x_, void* dx_, int64_t n, const float* numbers,
                      const float* spreads, float scale, float zero, Range range, double* dscale, double* dzero) {
  for (int64_t start = 0; start < n; start += TERMS * LANES) {
    const T *grad = (const T*)grad_ + start, *x = (const T*)x_ + start;
    T* dx = (T*)dx_ + start;
    const float *number = numbers + start, *spread = spreads + start;
    const int64_t size = n - start < TERMS * LANES ? n - start : TERMS * LANES;
    float sum_scale = 0, sum_zero = 0;
#pragma omp simd reduction(+ : sum_scale, sum_zero)
    for (int64_t i = 0; i < size; ++i) {
      const float at = moved<KIND>(widen(x[i]), number[i], spread[i], scale);
      const Terms term = terms(widen(grad[i]), at, scale, zero, range, kept<KIND>(number[i], spread[i]));
      dx[i] = pass(grad[i], term.inside);
      sum_scale += term.dscale;
      sum_zero += term.dzero;
    }
    *dscale += sum_scale;
    *dzero += sum_zero;
  }
}

// RUN codes fill BYTES bytes exactly, so a row is packed by as many and its rest bit by bit.
template <int BITS>
void pack(const uint8_t* code, uint8_t* word, int64_t n) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  constexpr int RUN = 8 % BITS ? 8 : 8 / BITS, BYTES = RUN * BITS / 8;
  const int64_t runs = n / RUN;
#pragma omp simd
  for (int64_t r = 0; r < runs; ++r) {
    uint32_t stream = 0;
    for (int j = 0; j < RUN; ++j) stream |= (code[RUN * r + j] & mask) << (BITS * j);
    for (int b = 0; b < BYTES; ++b) word[BYTES * r + b] = uint8_t(stream >> (8 * b));
  }
  uint32_t stream = 0;
  for (int64_t j = RUN * runs; j < n; ++j) stream |= (code[j] & mask) << (BITS * (j - RUN * runs));
  const int64_t bytes = (n * BITS + 7) / 8;
  for (int64_t b = BYTES * runs; b < bytes; ++b, stream >>= 8) word[b] = uint8_t(stream);
}

template <int BITS>
void unpack(const uint8_t* word, uint8_t* code, int64_t n) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  constexpr int RUN = 8 % BITS ? 8 : 8 / BITS, BYTES = RUN * BITS / 8;
  const int64_t runs = n / RUN;
#pragma omp simd
  for (int64_t r = 0; r < runs; ++r) {
    uint32_t stream = 0;
    for (int b = 0; b < BYTES; ++b) stream |= uint32_t(word[BYTES * r + b]) << (8 * b);
    for (int j = 0; j < RUN; ++j) code[RUN * r + j] = uint8_t((stream >> (BITS * j)) & mask);
  }
  uint32_t stream = 0;
  const int64_t bytes = (n * BITS + 7) / 8;
  for (int64_t b = BYTES * runs; b < bytes; ++b) stream |= uint32_t(word[b]) << (8 * (b - BYTES * runs));
  for (int64_t j = RUN * runs; j < n; ++j, stream >>= BITS) code[j] = uint8_t(stream & mask);
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
#define OF_KIND(loop, kind) {loop<kind, float>, loop<kind, bfloat16>, loop<kind, float16>}
#define FOR_EACH_KIND(loop) {OF_KIND(loop, TTAQ_DROP), OF_KIND(loop, TTAQ_STEP), OF_KIND(loop, TTAQ_GAUSS)}

const Kernels TTAQ_LEVEL::kernels = {
    FOR_EACH_SPAN(forward),
    {FOR_EACH_DTYPE(backward_row), FOR_EACH_DTYPE(backward_columns)},
    FOR_EACH_SPAN(codes),
    {draw<TTAQ_DROP>, draw<TTAQ_STEP>, draw<TTAQ_GAUSS>},
    FOR_EACH_KIND(perturb),
    FOR_EACH_KIND(perturb_backward),
    {OF_KIND(log2_forward, 1), OF_KIND(log2_forward, 2)},
    {OF_KIND(log2_codes, 1), OF_KIND(log2_codes, 2)},
    {OF_KIND(log2_backward, 1), OF_KIND(log2_backward, 2)},
    {nullptr, nullptr, pack<2>, pack<3>, pack<4>, nullptr, nullptr, nullptr, copy},
    {nullptr, nullptr, unpack<2>, unpack<3>, unpack<4>, nullptr, nullptr, nullptr, copy},
    TTAQ_LEVEL::soft_round,
    TTAQ_LEVEL::soft_round_backward,
    &TTAQ_LEVEL::aligned,
    FOR_EACH_DTYPE(extremes),
    total,
    &TTAQ_LEVEL::float_kernels,
};

}  // namespace ttaq
