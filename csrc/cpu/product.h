// Products of codes: the inner loops (product_kernels.cpp, for each instruction set) and what they read.
//
// A panel holds the words of sixteen outputs, dword by dword: dword d of all sixteen, then dword d + 1. A dword of b-bit
// codes is 8 / b planes of four codes: plane p, the bits b * p .. b * p + b - 1 of each of its bytes. A cell is a row of
// activation codes in that order: four of plane 0, four of plane 1, then those of the next dword.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace ttaq {

constexpr int PANEL_OUTPUTS = 16, MOST_ROWS = 8, MOST_PANELS = 3;

// The sums of each row of cells, of which run r begins at offsets[r], with as many stretches of `dwords` of each panel.
struct IntegerTile {
  const uint8_t* const* cells;  // by row
  const int64_t* offsets;       // by run
  int64_t runs, dwords;
  const uint32_t* panels;  // panel j at panels + j * panel
  int64_t panel;
  int32_t* sums;  // [rows][MOST_PANELS * PANEL_OUTPUTS], overwritten
};

// What follows the values of a layer: ttaq_ending.
struct Ending {
  const float *gain, *shift;  // by output of the layer, or null
  bool bounded, codes;
  float least, most;
  float y_scale, y_zero;
  Range range;
};

// What turns the sums of a tile, those of all inputs or of a piece of them, into values:
// (sums - shift * x_sum - x_zero * weight_sum) * (x_scale * scale), and in the end + bias.
struct Finish {
  const int32_t* sums;  // [rows][MOST_PANELS * PANEL_OUTPUTS]
  int rows, outputs;
  const int32_t *shift, *weight_sum;  // by output; weight_sum less `terms * shift`
  const float *scale, *bias;          // bias may be null
  const int32_t *x_sum, *x_zero;      // by row
  const float* x_scale;
  float* values;   // [rows][MOST_PANELS * PANEL_OUTPUTS]: what the pieces before gave
  void* const* y;  // by row
  bool first, last;
  const Ending* ending;         // may be null
  int64_t output;               // of the layer: the first one here
  const void* const* residual;  // by row, of the dtype of y where that is no codes; may be null
};

// The same for a row of channels that are convolved by themselves.
struct FinishDeep {
  const int32_t *sums, *code_sums, *shift, *weight_sum;  // by channel
  const float *scale, *bias;
  int64_t channels;
  float x_scale;
  int32_t x_zero;
  void* y;
  const Ending* ending;  // may be null, and so the residual
  const void* residual;
};

// Indexed by planes / 2: 1, 2 and 4 planes.
struct Products {
  int rows, panels;  // of the largest tile
  void (*integer[3][MOST_ROWS][MOST_PANELS])(const IntegerTile& tile);  // by rows - 1 and panels - 1
  // Makes `count` cells of `width` bytes, side by side, of as many rows of `channels` codes, `stride` apart, with the sum
  // of each. `sums` may be null.
  void (*arrange[3])(const uint8_t* codes, int64_t stride, int64_t count, int64_t channels, uint8_t* cells,
                     int64_t width, int32_t* sums);
  // Lays out n codes by planes, `stream` bytes apart.
  void (*spread[3])(const uint8_t* codes, int64_t n, uint8_t* planes, int64_t stream);
  // Turns sixteen rows of sixteen bytes into columns, and sixteen rows of dwords, each xored with `flipped`, into a panel.
  void (*interleave)(const uint8_t* rows, int64_t stride, uint8_t* columns, int64_t column_stride);
  void (*transpose)(const uint8_t* const* rows, int64_t dwords, uint32_t flipped, uint32_t* panel);
  void (*widen)(const uint8_t* words, int64_t n, uint8_t* wide);  // codes of 3 bits to 4
  // By enum ttaq_dtype; return how many values behind codes are not finite.
  int32_t (*finish[3])(const Finish& finish);
  // Of a convolution of each channel by itself: lays out signed weights [taps][width], width a multiple of 64, as the
  // second reads them, in [taps rounded up to 4][width]; and the sums over taps of code * weight and of codes, [width].
  void (*deepen)(const int8_t* weight, int64_t taps, int64_t width, int8_t* deep);
  void (*depthwise)(const uint8_t* cell, const int64_t* offsets, const int8_t* deep, int64_t taps, int64_t width,
                    int32_t* sums, int32_t* code_sums);
  int32_t (*finish_deep[3])(const FinishDeep& finish);  // as finish
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
