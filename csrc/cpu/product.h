// Products of codes: the inner loops (product_kernels.cpp, for each instruction set) and what they read.
//
// A panel holds the words of sixteen outputs, dword by dword: dword d of all sixteen, then dword d + 1. A dword of b-bit
// codes is 8 / b planes of four codes: plane p, the bits b * p .. b * p + b - 1 of each of its bytes. A cell is a row of
// activation codes in that order: four of plane 0, four of plane 1, then those of the next dword.
#pragma once

#include <stdint.h>

namespace ttaq {

constexpr int LANES = 16, MOST_ROWS = 8, MOST_PANELS = 3;

// The sums over `taps` cells of each row with as many stretches of `dwords` of each panel.
struct IntegerTile {
  const uint8_t* const* cells;  // taps * rows of them: those of tap 0, of tap 1, ...
  int64_t taps, dwords;
  const uint32_t* panels;  // panel j at panels + j * panel
  int64_t panel;
  int32_t* sums;  // [rows][MOST_PANELS * LANES], overwritten
};

// What turns the sums of a tile, those of all inputs or of a piece of them, into values:
// (sums - shift * x_sum - x_zero * weight_sum) * (x_scale * scale), and in the end + bias.
struct Finish {
  const int32_t* sums;  // [rows][MOST_PANELS * LANES]
  int rows, outputs;
  const int32_t *shift, *weight_sum;  // by output; weight_sum less `terms * shift`
  const float *scale, *bias;          // bias may be null
  const int32_t *x_sum, *x_zero;      // by row
  const float* x_scale;
  float* values;   // [rows][MOST_PANELS * LANES]: what the pieces before gave
  void* const* y;  // by row
  bool first, last;
};

// Indexed by planes / 2: 1, 2 and 4 planes.
struct Products {
  int rows, panels;  // of the largest tile
  void (*integer[3][MOST_ROWS][MOST_PANELS])(const IntegerTile& tile);  // by rows - 1 and panels - 1
  void (*arrange[3])(const uint8_t* codes, int64_t n, uint8_t* cell, int64_t width);
  void (*spread[3])(const uint8_t* codes, int64_t n, uint8_t* planes, int64_t stream);
  void (*transpose)(const uint8_t* const* rows, int64_t dwords, uint32_t flipped, uint32_t* panel);
  void (*widen)(const uint8_t* words, int64_t n, uint8_t* wide);  // codes of 3 bits to 4
  void (*finish[3])(const Finish& finish);                        // by enum ttaq_dtype
  // Of a convolution of each channel by itself: the sums over `taps` pixels of (code - x_zero) * weight, weight: [taps]
  // [channels]; and sums * (x_scale * scale) + bias.
  void (*depthwise)(const uint8_t* const* cells, const int16_t* weight, int64_t taps, int64_t channels, int32_t x_zero,
                    int32_t* sums);
  void (*scale_rows[3])(const int32_t* sums, const float* scale, const float* bias, float x_scale, int64_t channels,
                        void* y);
  // Null, or: the sums of `rows` <= 4 rows of words with `inputs` <= 4 rows of activations, [rows][4], and of the codes
  // themselves. The codes of an input lie by planes: those of plane 0, with zeros to a multiple of 64, those of plane 1.
  void (*dot[3])(const uint8_t* const* words, int rows, int64_t bytes, const uint8_t* planes, int inputs,
                 int64_t input_stride, int32_t* sums, int32_t* code_sums);
};

namespace base {
extern const Products products;
}
#if defined(__x86_64__)
namespace v3 {
extern const Products products;
}
namespace v4 {
extern const Products products;  // wants AVX-512 VNNI as well
}
#endif

// The loops of a level (enum ttaq_level), or null where this processor cannot run them.
const Products* products_of(int level);

}  // namespace ttaq
