// The loops that multiply floats with packed weights, compiled once for each instruction set (float_kernels.cpp).
#pragma once

#include <stdint.h>

namespace ttaq {

// Packed weights: rows of codes, `bits` a code, and a scale and a zero for each `group` columns of a row.
struct Weights {
  const uint8_t *words, *end;  // nothing at or beyond `end` may be read
  int64_t row_bytes;
  const float* scale;
  const int32_t* zero;
  int64_t group, groups;  // one group as wide as a row where there are none

  const uint8_t* row(int64_t n) const { return words + n * row_bytes; }
};

constexpr int64_t PANEL = 64;     // columns of a tile that `multiply` takes, and of its sums
constexpr int64_t TOGETHER = 4;   // rows of a tile that `dots` takes at a time
constexpr int64_t PADDING = 16;   // floats; no level's vectors are longer

// `count` stretches of `depth` floats, of which run r begins offsets[r] behind the start of a row.
struct Runs {
  const int64_t* offsets;
  int64_t count, depth;
};

// Arrays are indexed by the bits, or by enum ttaq_dtype.
struct FloatKernels {
  // Writes (code - zero) * scale for `rows` rows from `row` on and `columns` columns from `column` on, rows `stride`
  // apart. Each row is filled up to a multiple of PADDING with zeros.
  void (*dequantise[9])(const Weights& weights, int64_t row, int64_t rows, int64_t column, int64_t columns,
                        float* tile, int64_t stride);
  // sums[i][0 .. PANEL) += x[i][start .. start + depth) times the tile of `depth` lines of PANEL floats, for m rows x.
  void (*multiply)(const float* const* x, int64_t m, int64_t start, int64_t depth, const float* tile, float* sums);
  // sums[i][j] += the product of what the runs of row x[i] hold and line j of the tile, for m rows and n lines. depth:
  // a multiple of PADDING; n: of TOGETHER.
  void (*dots)(const float* const* x, int64_t m, const Runs& runs, const float* tile, int64_t stride, int64_t n,
               float* sums, int64_t sums_stride);
  // sums[0 .. n) += the sum of values[tap][0 .. n) * weights[tap][0 .. n) over the taps.
  void (*weigh)(const float* const* values, const float* const* weights, int64_t taps, int64_t n, float* sums);
  // Orders k floats as `row_sums` reads them, and gives their number with the zeros that fill the last block.
  int64_t (*spread)(const float* x, int64_t k, float* out);
  // sums[i] = the sum over a row of (code - zero) * x, for `rows` rows of one group each.
  void (*row_sums[9])(const Weights& weights, int64_t row, int64_t rows, const float* x, int64_t k, float* sums);
  void (*widen[3])(const void* from, int64_t n, float* to);
  void (*narrow[3])(const float* from, int64_t n, void* to);
};

constexpr int64_t LONGEST_BLOCK = 128;  // floats of a block that `spread` fills

}  // namespace ttaq
