// The inner loops, compiled once for each instruction set (*kernels.cpp) and picked at run time (levels.cpp).
#pragma once

#include <stdint.h>

namespace ttaq {

struct Range {
  float low, high;
};

// Elements that lie in `lines` lines of `size` elements, `stride` apart.
struct Block {
  int64_t size, lines, stride;
};

constexpr int64_t WIDTH = 1024;  // no block of several lines is wider

// Indexed by Span and enum ttaq_dtype, by enum ttaq_kind or the roots (from 1) and enum ttaq_dtype, or by the bits.
enum Span {
  ROW = 0,      // scale and zero point to one value for the whole block, dscale and dzero to one sum
  COLUMNS = 1,  // to one value, one sum for each element of a line
};

constexpr int64_t DRAWN = 256;  // random numbers are drawn, and elements perturbed, by as many

// Weights that lie together, their learned roundings, and a scale and a zero for each.
struct SoftWeights {
  const float *w, *v, *scale, *zero;
  int64_t size;
  float beta;
  Range range;
};

// One scale and one rounded zero.
struct Grid {
  float scale, zero;
  Range range;
};

// Where what is seen of the values goes, by channel or by element of a line. All are added to, or compared with.
struct Seen {
  double *sum, *squares, *clipped;
  float *least, *greatest;
};

// Where the gradients of the alignment and of the grid go, alike; added to.
struct AlignedSums {
  double *dgain, *dshift, *dscale, *dzero;
};

// Indexed by Span and enum ttaq_dtype; gain and shift follow the span as a scale and a zero do.
struct Aligned {
  void (*forward[2][3])(const void* x, void* y, Block block, const float* gain, const float* shift, Grid grid);
  void (*observed[2][3])(const void* x, void* y, Block block, const float* gain, const float* shift, Grid grid,
                         const Seen& seen);
  void (*backward[2][3])(const void* grad, const void* x, void* dx, Block block, const float* gain,
                         const float* shift, Grid grid, const AlignedSums& sums);
};

struct FloatKernels;  // float_kernels.h

// Without a sum of squares to learn from, `energy` and `denergy` are null; else they have one value an element.
struct Kernels {
  void (*forward[2][3])(const void* x, void* y, Block block, const float* scale, const float* zero, Range range);
  void (*backward[2][3])(const void* grad, const void* x, void* dx, Block block, const float* scale,
                         const float* zero, Range range, double* dscale, double* dzero);  // adds to the two
  int64_t (*codes[2][3])(const void* x, uint8_t* codes, Block block, const float* scale, const float* zero,
                         Range range);  // returns how many elements are not finite
  void (*draw[3])(uint64_t seed, int64_t block, float* numbers);  // those of elements block * DRAWN and on
  void (*perturb[3][3])(const void* x, void* y, int64_t n, const float* numbers, const float* spreads, float scale,
                        float zero, Range range);  // n <= DRAWN
  void (*perturb_backward[3][3])(const void* grad, const void* x, void* dx, int64_t n, const float* numbers,
                                 const float* spreads, float scale, float zero, Range range, double* dscale,
                                 double* dzero);  // adds to the two
  void (*log2_forward[2][3])(const void* x, void* y, int64_t n, float scale, int32_t qmax);
  int64_t (*log2_codes[2][3])(const void* x, uint8_t* codes, int64_t n, float scale, int32_t qmax);
  double (*log2_backward[2][3])(const void* grad, const void* x, void* dx, int64_t n, float scale, int32_t qmax);
  void (*pack[9])(const uint8_t* codes, uint8_t* words, int64_t n);
  void (*unpack[9])(const uint8_t* words, uint8_t* codes, int64_t n);
  void (*soft_round)(const SoftWeights& weights, float* y, double* penalty, float* energy);  // adds to the two
  void (*soft_round_backward)(const float* grad, float dpenalty, const float* denergy, const SoftWeights& weights,
                              float* dv);
  const Aligned* aligned;
  Range (*extremes[3])(const void* x, int64_t n);  // with 0.0 among them; NaN where there is one
  int32_t (*total)(const uint8_t* codes, int64_t n);
  const FloatKernels* floats;
};

namespace base {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
#endif

#if defined(TTAQ_LEVEL)
namespace TTAQ_LEVEL {
void soft_round(const SoftWeights& weights, float* y, double* penalty, float* energy);
void soft_round_backward(const float* grad, float dpenalty, const float* denergy, const SoftWeights& weights,
                         float* dv);
extern const Aligned aligned;
extern const FloatKernels float_kernels;
}  // namespace TTAQ_LEVEL
#endif

// The loops of a level (enum ttaq_level), or null where this processor cannot run them.
const Kernels* kernels_of(int level);

}  // namespace ttaq
