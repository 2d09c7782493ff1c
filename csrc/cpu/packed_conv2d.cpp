// The convolution of activation codes on packed weights: a product over cells, one for each pixel and group, or a loop
// over taps where every channel is convolved by itself.
#include <string.h>

#include "arguments.h"
#include "geometry.h"
#include "integer_product.h"

namespace ttaq {
namespace {

// The cell of the first tap of row `m`, and how far behind it tap (r, s) lies.
int64_t cell_of(const Geometry& g, int64_t group, int64_t m) {
  const int64_t image = m / g.out_pixels(), pixel = m % g.out_pixels();
  const int64_t line = (image * g.groups + group) * g.tall() + pixel / g.out_width * g.stride_h;
  return line * g.wide() + pixel % g.out_width * g.stride_w;
}
int64_t behind(const Geometry& g, int64_t r, int64_t s) { return r * g.step_h * g.wide() + s * g.step_w; }

constexpr int64_t STRIP = 16;  // pixels of a line that are looked at together

// The pixels of the padded images as cells, one image and group after the other: of `width` bytes, as `arrange` lays
// them out, with the sum over the taps of a line that begin at each. The padding holds `x_zero`, which stands for 0.0.
class Cells {
 public:
  Cells(const uint8_t* x, const Geometry& g, bool channels_last, int32_t x_zero, int64_t width, int plan, bool add_up,
        const Products& products, int threads)
      : x_(x), g_(g), channels_last_(channels_last), width_(width), plan_(plan), products_(products) {
    const int64_t lines = g.batch * g.groups * g.tall();
    made_ = kept(FOR_CELLS, lines * g.wide() * width);
    if (add_up) sums_.resize(size_t(lines * g.wide()), 0);
    const int64_t c = g.inputs();
    const std::vector<uint8_t> zeros(size_t(c), static_cast<uint8_t>(x_zero));
    std::vector<uint8_t> nothing(size_t(width), 0);
    products.arrange[plan](zeros.data(), 0, 1, c, nothing.data(), width, nullptr);
    parallel_for(lines, threads, [&](int64_t first, int64_t last) {
      std::vector<uint8_t> strip(size_t(STRIP * (c + 16)), 0);
      for (int64_t line = first; line < last; ++line) {
        fill(line, nothing.data(), int32_t(c) * x_zero, strip.data());
        if (add_up) add_taps(&sums_[size_t(line * g.wide())]);
      }
    });
  }
  const uint8_t* codes() const { return made_; }
  const int32_t* sums() const { return sums_.data(); }

 private:
  void fill(int64_t line, const uint8_t* nothing, int32_t nothing_sum, uint8_t* strip) {
    const int64_t h = line % g_.tall() - g_.pad_h, plane = line / g_.tall();
    if (line % g_.tall() % g_.stride_h > (g_.kernel_h - 1) * g_.step_h) return;  // no tap comes here
    const auto pad = [&](int64_t from, int64_t to) {
      for (int64_t w = from; w < to; ++w) {
        memcpy(made_ + (line * g_.wide() + w) * width_, nothing, size_t(width_));
        if (!sums_.empty()) sums_[size_t(line * g_.wide() + w)] = nothing_sum;
      }
    };
    if (h < 0 || h >= g_.height) return pad(0, g_.wide());
    pad(0, g_.pad_w);
    pad(g_.pad_w + g_.width, g_.wide());
    const int64_t c = g_.inputs(), image = plane / g_.groups, group = plane % g_.groups;
    const auto arrange = [&](const uint8_t* codes, int64_t apart, int64_t w, int64_t n) {
      const int64_t cell = line * g_.wide() + g_.pad_w + w;
      products_.arrange[plan_](codes, apart, n, c, made_ + cell * width_, width_,
                               sums_.empty() ? nullptr : &sums_[size_t(cell)]);
    };
    if (channels_last_)
      return arrange(x_ + (image * g_.height + h) * g_.width * g_.channels + group * c, g_.channels, 0, g_.width);
    for (int64_t w = 0; w < g_.width; w += STRIP) {
      const int64_t n = std::min(STRIP, g_.width - w);
      gather(image * g_.channels + group * c, h * g_.width + w, n, strip);
      arrange(strip, c + 16, w, n);
    }
  }

  void add_taps(int32_t* sums) const {
    for (int64_t w = 0; w < g_.wide() - (g_.kernel_w - 1) * g_.step_w; ++w)
      for (int64_t s = 1; s < g_.kernel_w; ++s) sums[w] += sums[w + s * g_.step_w];
  }

  // Brings the channels of n pixels side by side.
  void gather(int64_t plane, int64_t pixel, int64_t n, uint8_t* strip) const {
    const int64_t c = g_.inputs(), apart = c + 16;
    const uint8_t* from = x_ + plane * g_.pixels() + pixel;
    int64_t first = 0;
    for (; n == STRIP && first + 16 <= c; first += 16)
      products_.interleave(from + first * g_.pixels(), g_.pixels(), strip + first, apart);
    for (; first < c; ++first)
      for (int64_t i = 0; i < n; ++i) strip[i * apart + first] = from[first * g_.pixels() + i];
  }

  const uint8_t* x_;
  const Geometry& g_;
  const bool channels_last_;
  const int64_t width_;
  const int plan_;
  const Products& products_;
  uint8_t* made_;
  std::vector<int32_t> sums_;
};

void by_panels(const PackedWeight& weight, const Kernels& kernels, const Products& products, const Cells& cells,
               const Geometry& g, const Values& values, int threads) {
  const Panels panels(weight, kernels, products, threads);
  const int64_t width = weight.cell_bytes();
  const bool side_by_side = g.step_w == 1;  // the taps of a line are one run
  CellRuns runs{{}, side_by_side ? g.kernel_w : 1};
  std::vector<int64_t> lines;
  for (int64_t r = 0; r < g.kernel_h; ++r) {
    lines.push_back(behind(g, r, 0));
    for (int64_t s = 0; s < (side_by_side ? 1 : g.kernel_w); ++s) runs.offsets.push_back(behind(g, r, s) * width);
  }
  multiply(weight, panels, products, runs, values, threads,
           [&](int64_t group, int64_t first, int rows, const uint8_t** at, int32_t* x_sums) {
             for (int i = 0; i < rows; ++i) {
               const int64_t cell = cell_of(g, group, first + i);
               at[i] = cells.codes() + cell * width;
               x_sums[i] = 0;
               for (const int64_t line : lines) x_sums[i] += cells.sums()[cell + line];
             }
           });
}

// What a convolution of every channel by itself makes of the words.
struct Deep {
  Deep(const PackedWeight& weight, const Kernels& kernels, const Products& products, int64_t width)
      : weights(size_t((weight.taps + 3) * width), 0), shift(size_t(width), 0), sum(size_t(width), 0) {
    const int64_t offset = weight.stored == 8 ? 128 : 0;
    std::vector<int8_t> centred(size_t(weight.taps * width), 0);
    std::vector<uint8_t> codes(size_t(weight.taps), 0);
    for (int64_t c = 0; c < weight.groups; ++c) {
      kernels.unpack[weight.stored](weight.words + c * weight.row_bytes, codes.data(), weight.taps);
      shift[size_t(c)] = int32_t(weight.zero[c] - offset);
      for (int64_t tap = 0; tap < weight.taps; ++tap) {
        centred[size_t(tap * width + c)] = int8_t(codes[size_t(tap)] - offset);
        sum[size_t(c)] += int32_t(codes[size_t(tap)]) - weight.zero[c];
      }
    }
    products.deepen(centred.data(), weight.taps, width, weights.data());
  }
  std::vector<int8_t> weights;
  std::vector<int32_t> shift, sum;
};

void depthwise(const PackedWeight& weight, const Kernels& kernels, const Products& products, const uint8_t* codes,
               const Geometry& g, int64_t width, const Values& values, int threads) {
  const Deep deep(weight, kernels, products, width);
  std::vector<int64_t> offsets;
  for (int64_t r = 0; r < g.kernel_h; ++r)
    for (int64_t s = 0; s < g.kernel_w; ++s) offsets.push_back(behind(g, r, s) * width);
  const Follows& follows = values.follows;
  const int64_t size = follows.y_bytes(), wide_as = follows.bytes(), apart = values.output;
  const bool gathers = apart != 1 && follows.residual();
  parallel_for(values.rows, threads, [&](int64_t first, int64_t last) {
    std::vector<int32_t> sums(size_t(2 * width), 0);
    std::vector<uint8_t> row(size_t(apart == 1 ? 0 : g.channels * size));
    std::vector<uint8_t> residual(size_t(gathers ? g.channels * wide_as : 0));
    for (int64_t m = first; m < last; ++m) {
      products.depthwise(codes + cell_of(g, 0, m) * width, offsets.data(), deep.weights.data(), g.taps(), width,
                         sums.data(), sums.data() + width);
      const int64_t start = values.start(m);
      uint8_t* y = static_cast<uint8_t*>(values.y) + start * size;
      const uint8_t* added = follows.residual() ? follows.residual() + start * wide_as : nullptr;
      for (int64_t c = 0; gathers && c < g.channels; ++c)
        memcpy(&residual[size_t(c * wide_as)], added + c * apart * wide_as, size_t(wide_as));
      follows.count(products.finish_deep[values.dtype](
          {sums.data(), sums.data() + width, deep.shift.data(), deep.sum.data(), weight.scale, values.bias, g.channels,
           values.x_scale[0], values.x_zero[0], row.empty() ? y : row.data(), follows.ending(),
           gathers ? residual.data() : added}));
      for (int64_t c = 0; !row.empty() && c < g.channels; ++c)
        memcpy(y + c * apart * size, row.data() + c * size, size_t(size));
    }
  });
}

// The bits of a code in a panel: those that make the least of a tap whose channels do not fill its dwords.
int panel_bits(int stored, int64_t channels) {
  const int bits = stored == 3 ? 4 : stored, planes = 8 / bits;
  return ceil_div(channels, 4) < planes * ceil_div(channels, 4 * planes) ? 8 : bits;
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_packed_conv2d(const uint8_t* x, const uint8_t* words, const float* scale, const int32_t* zero,
                           const float* bias, const float* x_scale, const int32_t* x_zero, void* y, int dtype, int bits,
                           int channels_last, const int64_t* geometry, const ttaq_ending* given, int threads,
                           int level) {
  const Kernels* kernels = kernels_of(level);
  const Products* products = products_of(level);
  if (!kernels || !products) return TTAQ_BAD_LEVEL;
  if (!is_float(dtype)) return TTAQ_BAD_DTYPE;
  if (!has_width(bits)) return TTAQ_BAD_BITS;
  Geometry g;
  memcpy(&g, geometry, sizeof g);
  const PackedWeight weight{words, ceil_div(g.taps() * g.inputs() * bits, 8), bits, panel_bits(bits, g.inputs()),
                            g.groups, g.group_outputs(), g.taps(), g.inputs(), 1, scale, zero};
  const Follows follows(given, dtype);
  const Values values{x_scale, x_zero, false, bias, y, dtype, g.batch * g.out_pixels(), g.out_pixels(),
                      g.outputs * g.out_pixels(), channels_last ? g.outputs : 1, channels_last ? 1 : g.out_pixels(),
                      follows};
  try {
    if (g.alone()) {  // cells of all channels
      Geometry whole = g;
      whole.groups = 1;
      const int64_t width = ceil_div(g.channels, 64) * 64;
      const Cells cells(x, whole, channels_last != 0, x_zero[0], width, 0, false, *products, threads);
      depthwise(weight, *kernels, *products, cells.codes(), whole, width, values, threads);
    } else {
      const Cells cells(x, g, channels_last != 0, x_zero[0], weight.cell_bytes(), weight.planes() / 2, true, *products,
                        threads);
      by_panels(weight, *kernels, *products, cells, g, values, threads);
    }
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}
