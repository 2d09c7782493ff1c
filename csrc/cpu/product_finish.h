// The inner loops that turn sums into values, and take these through what follows, in blocks of as many outputs as a
// panel has: every loop over a block has a fixed length, and only what is stored is cut to the outputs there are.
#pragma once

#include "arithmetic.h"
#include "number.h"
#include "product_vector.h"

namespace ttaq {
namespace {

constexpr int BLOCK = PANEL_OUTPUTS;

// The first n values at `from`; beyond them 0.
template <class T>
struct Block16 {
  T at[BLOCK];
  Block16(const T* from, int n) {
    if (n == BLOCK) {
      memcpy(at, from, sizeof at);
      return;
    }
    memset(at, 0, sizeof at);
    memcpy(at, from, size_t(n) * sizeof(T));
  }
};

template <class T>
inline void put(T* y, const T (&from)[BLOCK], int n) {
  if (n == BLOCK)
    memcpy(y, from, sizeof from);
  else
    memcpy(y, from, size_t(n) * sizeof(T));
}

// What follows the outputs of a block.
struct Affine {
  bool asked;
  Block16<float> gain, shift;
  // Without any, `other` is read instead.
  Affine(const Ending* e, int64_t output, int n, const float* other)
      : asked(e && e->gain), gain(asked ? e->gain + output : other, n), shift(asked ? e->shift + output : other, n) {}
};

// Takes the values of outputs from `first` on through what follows, if anything does, to the row `y`, and counts for
// each those behind codes that are not finite.
template <class T>
inline void follow(float (&v)[BLOCK], int64_t first, int n, const Ending* ending, const Affine& affine,
                   const void* residual, void* y, int32_t (&bad)[BLOCK]) {
  static constexpr Ending NOTHING{};
  const Ending& e = ending ? *ending : NOTHING;
  if (affine.asked) {
#pragma omp simd
    for (int j = 0; j < BLOCK; ++j) v[j] = v[j] * affine.gain.at[j] + affine.shift.at[j];
  }
  if (residual) {
    const Block16<T> added((const T*)residual + first, n);
#pragma omp simd
    for (int j = 0; j < BLOCK; ++j) v[j] += ttaq::widen(added.at[j]);
  }
  if (e.bounded) {
#pragma omp simd
    for (int j = 0; j < BLOCK; ++j) {  // no negative zero behind a ReLU, and a NaN stays
      const float low = v[j] <= e.least ? e.least : v[j];
      v[j] = low > e.most ? e.most : low;
    }
  }
  if (!e.codes) {
    T out[BLOCK];
#pragma omp simd
    for (int j = 0; j < BLOCK; ++j) narrow(v[j], out[j]);
    return put(static_cast<T*>(y) + first, out, n);
  }
  int32_t wide[BLOCK];
#pragma omp simd
  for (int j = 0; j < BLOCK; ++j) {
    bad[j] += fabsf(v[j]) <= 3.402823466e38f ? 0 : 1;
    const float sum = nearest(v[j] / e.y_scale) + e.y_zero;
    wide[j] = int32_t(clamp(sum == sum ? sum : e.y_zero, e.range));
  }
  uint8_t codes[BLOCK];  // in a loop of their own, bytes do not make the vectors of the other one narrow
#pragma omp simd
  for (int j = 0; j < BLOCK; ++j) codes[j] = uint8_t(wide[j]);
  put(static_cast<uint8_t*>(y) + first, codes, n);
}

inline int32_t total(const int32_t (&bad)[BLOCK], int n) {
  int32_t sum = 0;
  for (int j = 0; j < n; ++j) sum += bad[j];
  return sum;
}

template <class T>
int32_t finish(const Finish& f) {
  int32_t nonfinite = 0;
  for (int first = 0; first < f.outputs; first += BLOCK) {
    const int n = f.outputs - first < BLOCK ? f.outputs - first : BLOCK;
    const Block16<int32_t> shift(f.shift + first, n), weight_sum(f.weight_sum + first, n);
    const Block16<float> scale(f.scale + first, n), bias(f.bias ? f.bias + first : f.scale + first, n);
    const Affine affine(f.ending, f.output + first, n, f.scale + first);
    int32_t bad[BLOCK] = {};
    for (int i = 0; i < f.rows; ++i) {
      const uint32_t x_sum = uint32_t(f.x_sum[i]), x_zero = uint32_t(f.x_zero[i]);
      const int32_t* sums = f.sums + i * ROW + first;
      float* values = f.values + i * ROW + first;
      float v[BLOCK];
#pragma omp simd
      for (int j = 0; j < BLOCK; ++j) {  // modulo 2^32: only the result has to fit
        const uint32_t exact =
            uint32_t(sums[j]) - uint32_t(shift.at[j]) * x_sum - x_zero * uint32_t(weight_sum.at[j]);
        v[j] = float(int32_t(exact)) * (f.x_scale[i] * scale.at[j]);
      }
      if (!f.first) {
#pragma omp simd
        for (int j = 0; j < BLOCK; ++j) v[j] += values[j];
      }
      if (!f.last) {
        memcpy(values, v, sizeof v);
        continue;
      }
      if (f.bias) {
#pragma omp simd
        for (int j = 0; j < BLOCK; ++j) v[j] += bias.at[j];
      }
      follow<T>(v, first, n, f.ending, affine, f.residual ? f.residual[i] : nullptr, f.y[i], bad);
    }
    nonfinite += total(bad, n);
  }
  return nonfinite;
}

template <class T>
int32_t finish_deep(const FinishDeep& f) {
  int32_t nonfinite = 0;
  const uint32_t x_zero = uint32_t(f.x_zero);
  for (int64_t first = 0; first < f.channels; first += BLOCK) {
    const int n = f.channels - first < BLOCK ? int(f.channels - first) : BLOCK;
    const Block16<float> scale(f.scale + first, n), bias(f.bias ? f.bias + first : f.scale + first, n);
    float v[BLOCK];
#pragma omp simd
    for (int j = 0; j < BLOCK; ++j) {
      const int64_t c = first + j;
      const uint32_t exact =
          uint32_t(f.sums[c]) - uint32_t(f.shift[c]) * uint32_t(f.code_sums[c]) - x_zero * uint32_t(f.weight_sum[c]);
      v[j] = float(int32_t(exact)) * (f.x_scale * scale.at[j]);
    }
    if (f.bias) {
#pragma omp simd
      for (int j = 0; j < BLOCK; ++j) v[j] += bias.at[j];
    }
    int32_t bad[BLOCK] = {};
    follow<T>(v, first, n, f.ending, Affine(f.ending, first, n, f.scale + first), f.residual, f.y, bad);
    nonfinite += total(bad, n);
  }
  return nonfinite;
}

}  // namespace
}  // namespace ttaq
