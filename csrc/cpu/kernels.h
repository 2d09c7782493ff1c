// The inner loops, compiled once for each instruction set (kernels.cpp) and picked at run time (levels.cpp).
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

// Indexed by Span and enum ttaq_dtype, by enum ttaq_kind and enum ttaq_dtype, or by the number of bits.
enum Span {
  ROW = 0,      // scale and zero point to one value for the whole block, dscale and dzero to one sum
  COLUMNS = 1,  // to one value, one sum for each element of a line
};

constexpr int64_t DRAWN = 256;  // random numbers are drawn, and elements perturbed, by as many

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
  void (*pack[9])(const uint8_t* codes, uint8_t* words, int64_t n);
  void (*unpack[9])(const uint8_t* words, uint8_t* codes, int64_t n);
  Range (*extremes[3])(const void* x, int64_t n);  // with 0.0 among them; NaN where there is one
  int32_t (*total)(const uint8_t* codes, int64_t n);
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_v3;
extern const Kernels kernels_v4;
#endif

// The loops of a level (enum ttaq_level), or null where this processor cannot run them.
const Kernels* kernels_of(int level);

}  // namespace ttaq
