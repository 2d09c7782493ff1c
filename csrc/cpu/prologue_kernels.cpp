// The inner loops of alignment, fake quantisation and observation in one pass, compiled once for each instruction set
// as kernels.cpp is.
#include "arithmetic.h"
#include "kernels.h"
#include "number.h"

namespace ttaq {
namespace {

inline float least_of(float a, float b) { return b < a ? b : a; }     // passes over a NaN in b
inline float greatest_of(float a, float b) { return b > a ? b : a; }  // as here

// What is seen of a few elements, in float32.
struct Few {
  float sum = 0, squares = 0, clipped = 0, least = INFINITY, greatest = -INFINITY;
};

inline void add(const Few& few, const Seen& seen, int64_t i) {
  seen.sum[i] += few.sum;
  seen.squares[i] += few.squares;
  seen.clipped[i] += few.clipped;
  seen.least[i] = least_of(seen.least[i], few.least);
  seen.greatest[i] = greatest_of(seen.greatest[i], few.greatest);
}

template <class T, class Parameter>
void forward(const void* x_, void* y_, Block block, const float* gain_, const float* shift_, Grid grid) {
  const Parameter gain(gain_), shift(shift_);
  for (int64_t line = 0; line < block.lines; ++line) {
    const T* x = (const T*)x_ + line * block.stride;
    T* y = (T*)y_ + line * block.stride;
#pragma omp simd
    for (int64_t i = 0; i < block.size; ++i) {
      const float v = widen(x[i]) * gain[i] + shift[i];
      narrow((clamp(nearest(v / grid.scale) + grid.zero, grid.range) - grid.zero) * grid.scale, y[i]);
    }
  }
}

template <class T>
void observed_row(const void* x_, void* y_, Block block, const float* gain_, const float* shift_, Grid grid,
                  const Seen& seen) {
  const float gain = *gain_, shift = *shift_;
  for (int64_t start = 0; start < block.size; start += TERMS * LANES) {
    const T* x = (const T*)x_ + start;
    T* y = (T*)y_ + start;
    const int64_t size = block.size - start < TERMS * LANES ? block.size - start : TERMS * LANES;
    float sum = 0, squares = 0, clipped = 0, least = INFINITY, greatest = -INFINITY;
#pragma omp simd reduction(+ : sum, squares, clipped) reduction(min : least) reduction(max : greatest)
    for (int64_t i = 0; i < size; ++i) {
      const float v = widen(x[i]) * gain + shift;
      const float code = nearest(v / grid.scale) + grid.zero;
      narrow((clamp(code, grid.range) - grid.zero) * grid.scale, y[i]);
      sum += v;
      squares += v * v;
      clipped += (code >= grid.range.low) & (code <= grid.range.high) ? 0.0f : 1.0f;
      least = least_of(least, v);
      greatest = greatest_of(greatest, v);
    }
    add({sum, squares, clipped, least, greatest}, seen, 0);
  }
}

template <class T>
void observed_columns(const void* x_, void* y_, Block block, const float* gain, const float* shift, Grid grid,
                      const Seen& seen) {
  float sum[WIDTH], squares[WIDTH], clipped[WIDTH], least[WIDTH], greatest[WIDTH];
  for (int64_t first = 0; first < block.lines; first += TERMS) {
    for (int64_t i = 0; i < block.size; ++i)
      sum[i] = squares[i] = clipped[i] = 0, least[i] = INFINITY, greatest[i] = -INFINITY;
    for (int64_t line = first; line < first + TERMS && line < block.lines; ++line) {
      const T* x = (const T*)x_ + line * block.stride;
      T* y = (T*)y_ + line * block.stride;
#pragma omp simd
      for (int64_t i = 0; i < block.size; ++i) {
        const float v = widen(x[i]) * gain[i] + shift[i];
        const float code = nearest(v / grid.scale) + grid.zero;
        narrow((clamp(code, grid.range) - grid.zero) * grid.scale, y[i]);
        sum[i] += v;
        squares[i] += v * v;
        clipped[i] += (code >= grid.range.low) & (code <= grid.range.high) ? 0.0f : 1.0f;
        least[i] = least_of(least[i], v);
        greatest[i] = greatest_of(greatest[i], v);
      }
    }
    for (int64_t i = 0; i < block.size; ++i) add({sum[i], squares[i], clipped[i], least[i], greatest[i]}, seen, i);
  }
}

// What one element gives.
struct Given {
  float dx, dgain, dshift, dscale, dzero;
};

inline Given given(float grad, float x, float gain, float shift, Grid grid) {
  const float quotient = (x * gain + shift) / grid.scale, rounded = nearest(quotient), code = rounded + grid.zero;
  const bool inside = (code >= grid.range.low) & (code <= grid.range.high);
  const float dv = inside ? grad : 0.0f, beyond = clamp(code, grid.range) - grid.zero;
  return {dv * gain, dv * x, dv, grad * (inside ? rounded - quotient : beyond), inside ? 0.0f : -grad * grid.scale};
}

template <class T>
void backward_row(const void* grad_, const void* x_, void* dx_, Block block, const float* gain_, const float* shift_,
                  Grid grid, const AlignedSums& sums) {
  const float gain = *gain_, shift = *shift_;
  for (int64_t start = 0; start < block.size; start += TERMS * LANES) {
    const T *grad = (const T*)grad_ + start, *x = (const T*)x_ + start;
    T* dx = (T*)dx_ + start;
    const int64_t size = block.size - start < TERMS * LANES ? block.size - start : TERMS * LANES;
    float dgain = 0, dshift = 0, dscale = 0, dzero = 0;
#pragma omp simd reduction(+ : dgain, dshift, dscale, dzero)
    for (int64_t i = 0; i < size; ++i) {
      const Given one = given(widen(grad[i]), widen(x[i]), gain, shift, grid);
      narrow(one.dx, dx[i]);
      dgain += one.dgain;
      dshift += one.dshift;
      dscale += one.dscale;
      dzero += one.dzero;
    }
    *sums.dgain += dgain;
    *sums.dshift += dshift;
    *sums.dscale += dscale;
    *sums.dzero += dzero;
  }
}

template <class T>
void backward_columns(const void* grad_, const void* x_, void* dx_, Block block, const float* gain,
                      const float* shift, Grid grid, const AlignedSums& sums) {
  float dgain[WIDTH], dshift[WIDTH], dscale[WIDTH], dzero[WIDTH];
  for (int64_t first = 0; first < block.lines; first += TERMS) {
    for (int64_t i = 0; i < block.size; ++i) dgain[i] = dshift[i] = dscale[i] = dzero[i] = 0;
    for (int64_t line = first; line < first + TERMS && line < block.lines; ++line) {
      const T *grad = (const T*)grad_ + line * block.stride, *x = (const T*)x_ + line * block.stride;
      T* dx = (T*)dx_ + line * block.stride;
#pragma omp simd
      for (int64_t i = 0; i < block.size; ++i) {
        const Given one = given(widen(grad[i]), widen(x[i]), gain[i], shift[i], grid);
        narrow(one.dx, dx[i]);
        dgain[i] += one.dgain;
        dshift[i] += one.dshift;
        dscale[i] += one.dscale;
        dzero[i] += one.dzero;
      }
    }
    for (int64_t i = 0; i < block.size; ++i) {
      sums.dgain[i] += dgain[i];
      sums.dshift[i] += dshift[i];
      sums.dscale[i] += dscale[i];
      sums.dzero[i] += dzero[i];
    }
  }
}

}  // namespace

#define FOR_EACH_DTYPE(loop) {loop<float>, loop<bfloat16>, loop<float16>}

const Aligned TTAQ_LEVEL::aligned = {
    {{forward<float, Same>, forward<bfloat16, Same>, forward<float16, Same>},
     {forward<float, const float*>, forward<bfloat16, const float*>, forward<float16, const float*>}},
    {FOR_EACH_DTYPE(observed_row), FOR_EACH_DTYPE(observed_columns)},
    {FOR_EACH_DTYPE(backward_row), FOR_EACH_DTYPE(backward_columns)},
};

}  // namespace ttaq
