// What the products of floats with packed weights share: blocks and memory.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "arguments.h"
#include "float_kernels.h"
#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace ttaq {

constexpr int64_t MOST_ROWS = 216;  // rows of gradients, or of activations that lie in memory, of a task
constexpr int64_t OUTPUTS = 48;     // lines of a tile of the forward,
constexpr int64_t DEPTH = 768;      // and its columns at most
constexpr int64_t LINES = 128;      // lines of a tile of the backward at most
constexpr int64_t LINE = DEPTH + PADDING;  // lines a page apart would push one another out of the cache

struct FreeFloats {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

inline Floats allocate(int64_t n) {
  return Floats(static_cast<float*>(::operator new[](size_t(n) * sizeof(float), std::align_val_t(64))));
}

inline int64_t padded(int64_t n) { return ceil_div(n, PADDING) * PADDING; }

// Equal parts, each a multiple of `unit`, as few as none larger than `most` allows.
struct Parts {
  int64_t total, size, count;

  Parts(int64_t total_, int64_t most, int64_t unit) : total(total_) {
    count = std::max<int64_t>(1, ceil_div(total, most));
    size = std::max(unit, ceil_div(ceil_div(total, count), unit) * unit);
    count = ceil_div(total, size);
  }
  int64_t start(int64_t part) const { return part * size; }
  int64_t length(int64_t part) const { return std::min(size, total - part * size); }
};

inline Weights weights_of(const uint8_t* words, const float* scale, const int32_t* zero, int bits, int64_t group,
                          int64_t n, int64_t k) {
  const int64_t row_bytes = ceil_div(k * bits, 8), whole = std::max<int64_t>(1, k);
  return {words, words + n * row_bytes, row_bytes, scale, zero, group ? group : whole, group ? k / group : 1};
}

// The loops of a level that read the weights, or an error.
inline int find(const FloatKernels** kernels, int level, int bits) {
  const Kernels* all = kernels_of(level);
  if (!all) return TTAQ_BAD_LEVEL;
  *kernels = all->floats;
  return bits < 2 || bits > 8 || !all->floats->dequantise[bits] ? TTAQ_BAD_BITS : TTAQ_OK;
}

// sums[i][0 .. n) += what the runs of row i hold, times the columns [column, column + depth) of the weights of outputs
// [output, output + n): n <= OUTPUTS, depth <= DEPTH, which the runs fill up to a multiple of PADDING. `tile`:
// OUTPUTS * LINE floats.
inline void add_outputs(const FloatKernels& kernels, const Weights& weights, int bits, const float* const* rows,
                        int64_t m, const Runs& runs, int64_t output, int64_t n, int64_t column, int64_t depth,
                        float* tile, float* sums) {
  const int64_t lines = ceil_div(n, TOGETHER) * TOGETHER;
  kernels.dequantise[bits](weights, output, n, column, depth, tile, LINE);
  for (int64_t line = n; line < lines; ++line) std::fill_n(tile + line * LINE, padded(depth), 0.0f);
  kernels.dots(rows, m, runs, tile, LINE, lines, sums, OUTPUTS);
}

// sums[i][0 .. n) += rows[i][0 .. outputs) times the columns [column, column + n) of the weights of outputs [output,
// output + outputs), n <= PANEL. `tile`: LINES * PANEL floats.
inline void add_inputs(const FloatKernels& kernels, const Weights& weights, int bits, const float* const* rows,
                       int64_t m, int64_t output, int64_t outputs, int64_t column, int64_t n, float* tile,
                       float* sums) {
  const Parts depth(outputs, LINES, 1);
  for (int64_t part = 0; part < depth.count; ++part) {
    const int64_t start = depth.start(part), length = depth.length(part);
    kernels.dequantise[bits](weights, output + start, length, column, n, tile, PANEL);
    for (int64_t line = 0; padded(n) < PANEL && line < length; ++line)
      std::fill(tile + line * PANEL + padded(n), tile + (line + 1) * PANEL, 0.0f);
    kernels.multiply(rows, m, start, length, tile, sums);
  }
}

}  // namespace ttaq
