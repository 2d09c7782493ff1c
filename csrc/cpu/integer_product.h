// Integer products of packed weights: what a call makes of the words, and the walk over tiles.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "layout.h"
#include "parallel.h"
#include "../ttaq_native.h"
#include "product.h"

namespace ttaq {

// The weight of a layer: `groups` times `outputs` rows of taps * channels codes, one tap after the other.
struct PackedWeight {
  const uint8_t* words;
  int64_t row_bytes;
  int stored;  // bits that a code takes in the words
  int bits;    // and in a panel: 4 for 3
  int64_t groups, outputs, taps, channels;
  int64_t pieces;  // of a row, each with a scale and a zero of its own
  const float* scale;
  const int32_t* zero;

  int planes() const { return 8 / bits; }
  bool in_place() const { return bits == stored && channels * bits % 32 == 0; }
  int64_t dwords() const { return ceil_div(channels * bits, 32); }  // of a tap
  int64_t cell_bytes() const { return dwords() * 4 * planes(); }
  int64_t offset() const { return bits == 8 ? 128 : 0; }  // that a code loses to fit a signed byte
};

// Memory of the calling thread that stays for its next call, one for each purpose and no larger than the largest layer
// needed: to fault in fresh pages costs more than to write what they hold.
enum Purpose { FOR_PANELS, FOR_CELLS, PURPOSES };
uint8_t* kept(Purpose purpose, int64_t bytes);

// Where the inputs of a row lie behind its first cell: runs of `length` taps each.
struct CellRuns {
  std::vector<int64_t> offsets;
  int64_t length;
};

// The words of a layer as panels, and per panel, piece and output what Finish wants to know.
class Panels {
 public:
  Panels(const PackedWeight& weight, const Kernels& kernels, const Products& products, int threads);

  const uint32_t* words(int64_t panel) const { return words_ + panel * size_; }
  int64_t size() const { return size_; }  // dwords of a panel
  int64_t per_group() const { return per_group_; }
  const int32_t* shift(int64_t piece, int64_t panel) const { return shift_.data() + at(piece, panel); }
  const int32_t* sum(int64_t piece, int64_t panel) const { return sum_.data() + at(piece, panel); }
  const float* scale(int64_t piece, int64_t panel) const { return scale_.data() + at(piece, panel); }

 private:
  int64_t at(int64_t piece, int64_t panel) const { return (piece * panels_ + panel) * PANEL_OUTPUTS; }
  void fill(const PackedWeight& weight, const Kernels& kernels, const Products& products, int64_t panel);
  void add_up(const PackedWeight& weight, const Products& products, const uint8_t* ones, int64_t panel);

  int64_t per_group_, panels_, size_;
  uint32_t* words_;
  std::vector<int32_t> shift_, sum_;
  std::vector<float> scale_;
};

// What follows the values of a layer, and where that finds its inputs and leaves what it sees.
class Follows {
 public:
  Follows(const ttaq_ending* given, int dtype);

  const Ending* ending() const { return given_ ? &ending_ : nullptr; }
  int64_t y_bytes() const { return given_ && ending_.codes ? 1 : bytes_; }  // of an element
  int64_t bytes() const { return bytes_; }                                  // of an element of the residual
  const uint8_t* residual() const { return given_ ? static_cast<const uint8_t*>(given_->residual) : nullptr; }
  void count(int32_t nonfinite) const;

 private:
  const ttaq_ending* given_;
  int64_t bytes_;
  Ending ending_;
};

// The grid of the activations, and where the values of a layer go: row m begins at
// m / pixels * image + m % pixels * pixel, and its outputs lie `output` apart.
struct Values {
  const float* x_scale;
  const int32_t* x_zero;
  bool token;  // one scale a row
  const float* bias;
  void* y;
  int dtype;
  int64_t rows, pixels, image, pixel, output;
  const Follows& follows;

  int64_t start(int64_t row) const { return row / pixels * image + row % pixels * pixel; }  // element of y
};

constexpr int64_t TOGETHER = 8;  // blocks of rows that share a look at the weight

// Writes the values of one tile; `cells` and `x_sums` are those of `rows` rows from `first` on.
void write_tile(const PackedWeight& weight, const Panels& panels, const Products& products, const CellRuns& runs,
                const Values& values, int64_t group, int64_t panel, int wide, int64_t first, int rows,
                const uint8_t* const* cells, const int32_t* x_sums);

// Calls gather(group, row, rows, cells, x_sums) for blocks of rows, which writes the first cell of each and
// [pieces][rows] sums, and multiplies each with all outputs of the group.
template <class Gather>
void multiply(const PackedWeight& weight, const Panels& panels, const Products& products, const CellRuns& runs,
              const Values& values, int threads, const Gather& gather) {
  if (values.rows == 0) return;
  const int64_t blocks = ceil_div(values.rows, products.rows), supers = ceil_div(blocks, TOGETHER);
  const int64_t columns = ceil_div(panels.per_group(), products.panels);
  const int64_t ranges = std::min(columns, ceil_div(4 * threads, supers * weight.groups));
  parallel_for(weight.groups * supers * ranges, threads, [&](int64_t begin, int64_t end) {
    const int64_t tall = products.rows;
    std::vector<const uint8_t*> cells(size_t(TOGETHER * tall), nullptr);
    std::vector<int32_t> x_sums(size_t(TOGETHER * tall * weight.pieces), 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t range = task % ranges, super = task / ranges % supers, group = task / ranges / supers;
      const int64_t from = blocks * super / supers, to = blocks * (super + 1) / supers;
      const auto row = [&](int64_t block) { return values.rows * block / blocks; };
      const auto at = [&](int64_t block) { return size_t((block - from) * tall); };
      for (int64_t b = from; b < to; ++b)
        gather(group, row(b), int(row(b + 1) - row(b)), &cells[at(b)], &x_sums[at(b) * size_t(weight.pieces)]);
      for (int64_t c = columns * range / ranges; c < columns * (range + 1) / ranges; ++c) {
        const int64_t panel = panels.per_group() * c / columns, next = panels.per_group() * (c + 1) / columns;
        for (int64_t b = from; b < to; ++b)
          write_tile(weight, panels, products, runs, values, group, panel, int(next - panel), row(b),
                     int(row(b + 1) - row(b)), &cells[at(b)], &x_sums[at(b) * size_t(weight.pieces)]);
      }
    }
  });
}

}  // namespace ttaq
