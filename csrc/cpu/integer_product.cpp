// Panels, and the values of a tile.
#include "integer_product.h"

#include <math.h>
#include <string.h>

#include "arguments.h"

namespace ttaq {
namespace {

// Copies the words of one output so that each tap begins a dword; what lies beyond a tap is 0.
void align_taps(const PackedWeight& w, const Kernels& kernels, const Products& products, const uint8_t* row,
                uint8_t* codes, uint8_t* aligned) {
  const int64_t bytes = w.dwords() * 4;
  memset(aligned, 0, size_t(w.taps * bytes));
  if (w.taps == 1 || w.channels * w.stored % 8 == 0) {
    for (int64_t tap = 0; tap < w.taps; ++tap) {
      const uint8_t* from = row + tap * w.channels * w.stored / 8;
      if (w.stored == w.bits)
        memcpy(aligned + tap * bytes, from, size_t(ceil_div(w.channels * w.bits, 8)));
      else if (w.bits == 8)
        kernels.unpack[w.stored](from, aligned + tap * bytes, w.channels);
      else
        products.widen(from, w.channels, aligned + tap * bytes);
    }
    return;
  }
  kernels.unpack[w.stored](row, codes, w.taps * w.channels);
  for (int64_t tap = 0; tap < w.taps; ++tap)
    kernels.pack[w.bits](codes + tap * w.channels, aligned + tap * bytes, w.channels);
}

// Moves the outputs of some rows between a tile, ROW apart, and elements `apart` of each other.
template <class T, bool OUT>
void move(void* tile_, int64_t outputs, int64_t rows, const int64_t* starts, int64_t apart, void* y_) {
  T *tile = static_cast<T*>(tile_), *y = static_cast<T*>(y_);
  for (int64_t j = 0; j < outputs; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      T &inside = tile[i * MOST_PANELS * PANEL_OUTPUTS + j], &outside = y[starts[i] + j * apart];
      (OUT ? outside : inside) = OUT ? inside : outside;
    }
}

template <bool OUT>
void move(int64_t size, void* tile, int64_t outputs, int64_t rows, const int64_t* starts, int64_t apart, void* y) {
  (size == 4   ? move<uint32_t, OUT>
   : size == 2 ? move<uint16_t, OUT>
               : move<uint8_t, OUT>)(tile, outputs, rows, starts, apart, y);
}

}  // namespace

uint8_t* kept(Purpose purpose, int64_t bytes) {
  static thread_local std::unique_ptr<uint8_t[]> memory[PURPOSES];
  static thread_local int64_t size[PURPOSES];
  if (size[purpose] < bytes) {
    size[purpose] = 0;
    memory[purpose].reset();
    memory[purpose].reset(new uint8_t[size_t(bytes)]);
    size[purpose] = bytes;
    advise_huge_pages(memory[purpose].get(), bytes);
  }
  return memory[purpose].get();
}

Panels::Panels(const PackedWeight& weight, const Kernels& kernels, const Products& products, int threads)
    : per_group_(ceil_div(weight.outputs, PANEL_OUTPUTS)),
      panels_(weight.groups * per_group_),
      size_(weight.taps * weight.dwords() * PANEL_OUTPUTS),
      words_(reinterpret_cast<uint32_t*>(kept(FOR_PANELS, panels_ * size_ * 4))),
      shift_(size_t(weight.pieces * panels_ * PANEL_OUTPUTS)),
      sum_(shift_.size()),
      scale_(shift_.size()) {
  std::vector<uint8_t> ones(size_t(weight.cell_bytes()));
  const std::vector<uint8_t> codes(size_t(weight.channels), 1);
  products.arrange[weight.planes() / 2](codes.data(), 0, 1, weight.channels, ones.data(), weight.cell_bytes(),
                                        nullptr);
  parallel_for(panels_, threads, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      fill(weight, kernels, products, panel);
      add_up(weight, products, ones.data(), panel);
    }
  });
}

void Panels::fill(const PackedWeight& weight, const Kernels& kernels, const Products& products, int64_t panel) {
  const int64_t bytes = weight.taps * weight.dwords() * 4, group = panel / per_group_;
  const int64_t first = panel % per_group_ * PANEL_OUTPUTS;
  const bool in_place = weight.in_place();
  std::vector<uint8_t> aligned(size_t(in_place ? bytes : PANEL_OUTPUTS * bytes)), codes;
  if (!in_place) codes.resize(size_t(weight.taps * weight.channels));
  const uint8_t* rows[PANEL_OUTPUTS];
  for (int64_t lane = 0; lane < PANEL_OUTPUTS; ++lane) {
    const uint8_t* row = weight.words + (group * weight.outputs + first + lane) * weight.row_bytes;
    const bool there = first + lane < weight.outputs;
    rows[lane] = in_place && there ? row : aligned.data() + (in_place ? 0 : lane * bytes);
    if (!in_place && there) align_taps(weight, kernels, products, row, codes.data(), aligned.data() + lane * bytes);
  }
  products.transpose(rows, bytes / 4, weight.bits == 8 ? 0x80808080u : 0, words_ + panel * size_);
}

void Panels::add_up(const PackedWeight& weight, const Products& products, const uint8_t* ones, int64_t panel) {
  const int64_t dwords = weight.dwords() / weight.pieces, terms = weight.taps * weight.channels / weight.pieces;
  const int64_t first = panel % per_group_ * PANEL_OUTPUTS, output = panel / per_group_ * weight.outputs + first;
  const std::vector<int64_t> here(size_t(weight.taps), 0);
  int32_t sums[MOST_PANELS * PANEL_OUTPUTS];
  for (int64_t piece = 0; piece < weight.pieces; ++piece) {
    products.integer[weight.planes() / 2][0][0](
        {&ones, here.data(), weight.taps, dwords, words(panel) + piece * dwords * PANEL_OUTPUTS, size_, sums});
    for (int64_t lane = 0; lane < std::min<int64_t>(PANEL_OUTPUTS, weight.outputs - first); ++lane) {
      const int64_t from = (output + lane) * weight.pieces + piece, to = at(piece, panel) + lane;
      const int32_t shift = int32_t(weight.zero[from] - weight.offset());
      shift_[size_t(to)] = shift;
      sum_[size_t(to)] = int32_t(uint32_t(sums[lane]) - uint32_t(terms) * uint32_t(shift));
      scale_[size_t(to)] = weight.scale[from];
    }
  }
}

Follows::Follows(const ttaq_ending* given, int dtype) : given_(given), bytes_(bytes_of(dtype)), ending_{} {
  if (!given) return;
  const bool codes = given->y_scale != nullptr;
  ending_ = {given->gain, given->shift, given->least > -INFINITY || given->most < INFINITY, codes, given->least,
             given->most, codes ? *given->y_scale : 1.0f, codes ? float(*given->y_zero) : 0.0f,
             {0.0f, float((1 << given->y_bits) - 1)}};
  if (codes) *given->nonfinite = 0;
}

void Follows::count(int32_t nonfinite) const {
  if (nonfinite) __atomic_fetch_add(given_->nonfinite, nonfinite, __ATOMIC_RELAXED);
}

void write_tile(const PackedWeight& weight, const Panels& panels, const Products& products, const CellRuns& runs,
                const Values& v, int64_t group, int64_t panel, int wide, int64_t first, int rows,
                const uint8_t* const* cells, const int32_t* x_sums) {
  constexpr int64_t WIDE = MOST_PANELS * PANEL_OUTPUTS;
  const int64_t at = group * panels.per_group() + panel, dwords = weight.dwords() / weight.pieces;
  const int outputs = int(std::min<int64_t>(wide * PANEL_OUTPUTS, weight.outputs - panel * PANEL_OUTPUTS));
  const int64_t size = v.follows.y_bytes(), output = group * weight.outputs + panel * PANEL_OUTPUTS;
  int32_t sums[MOST_ROWS * WIDE], x_zero[MOST_ROWS];
  float values[MOST_ROWS * WIDE], x_scale[MOST_ROWS];
  uint8_t scratch[MOST_ROWS * WIDE * 4], residuals[MOST_ROWS * WIDE * 4];
  int64_t starts[MOST_ROWS];
  void* y[MOST_ROWS];
  const void* residual[MOST_ROWS];
  const bool adds = v.follows.residual(), apart = adds && v.output != 1;
  for (int i = 0; i < rows; ++i) {
    x_scale[i] = v.x_scale[v.token ? first + i : 0];
    x_zero[i] = v.x_zero[v.token ? first + i : 0];
    starts[i] = v.start(first + i) + output * v.output;
    y[i] = v.output == 1 ? static_cast<uint8_t*>(v.y) + starts[i] * size : scratch + i * WIDE * size;
    residual[i] = apart ? residuals + i * WIDE * v.follows.bytes() : v.follows.residual() + starts[i] * v.follows.bytes();
  }
  if (apart)
    move<false>(v.follows.bytes(), residuals, outputs, rows, starts, v.output,
                const_cast<uint8_t*>(v.follows.residual()));
  const uint8_t* moved[MOST_ROWS];
  for (int64_t piece = 0; piece < weight.pieces; ++piece) {
    if (piece) {  // a layer whose weight has groups has one tap
      for (int i = 0; i < rows; ++i) moved[i] = cells[i] + piece * dwords * 4 * weight.planes();
    }
    products.integer[weight.planes() / 2][rows - 1][wide - 1](
        {piece ? moved : cells, runs.offsets.data(), int64_t(runs.offsets.size()), runs.length * dwords,
         panels.words(at) + piece * dwords * PANEL_OUTPUTS, panels.size(), sums});
    v.follows.count(products.finish[v.dtype](
        {sums, rows, outputs, panels.shift(piece, at), panels.sum(piece, at), panels.scale(piece, at),
         v.bias ? v.bias + output : nullptr, x_sums + piece * rows, x_zero, x_scale, values, y, piece == 0,
         piece + 1 == weight.pieces, v.follows.ending(), output, adds ? residual : nullptr}));
  }
  if (v.output != 1) move<true>(size, scratch, outputs, rows, starts, v.output, v.y);
}

}  // namespace ttaq
