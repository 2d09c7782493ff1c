// The convolution of activation codes on packed weights: a product over cells, one for each pixel and group, or a loop
// over taps where every channel is convolved by itself.
#include <string.h>

#include "../ttaq_native.h"
#include "integer_product.h"

namespace ttaq {
namespace {

struct Geometry {
  int64_t batch, channels, height, width, outputs, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, step_h, step_w, groups;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height * out_width; }

  // Calls body(tap, pixel of the input, or -1 in the padding) for the taps of an output pixel.
  template <class Body>
  void for_each_tap(int64_t pixel, const Body& body) const {
    const int64_t top = pixel / out_width * stride_h - pad_h, left = pixel % out_width * stride_w - pad_w;
    for (int64_t r = 0, tap = 0; r < kernel_h; ++r) {
      const int64_t h = top + r * step_h;
      for (int64_t s = 0; s < kernel_w; ++s, ++tap) {
        const int64_t w = left + s * step_w;
        body(tap, h >= 0 && h < height && w >= 0 && w < width ? h * width + w : int64_t(-1));
      }
    }
  }
};

constexpr int64_t STRIP = 64;  // pixels that are turned from planes of channels to channels at a time

// The codes of an image's pixels, channels side by side, whichever way they lie; made anew where they do not.
class Pixels {
 public:
  Pixels(const uint8_t* x, const Geometry& g, bool channels_last, int threads) : codes_(x) {
    if (channels_last || g.pixels() == 1) return;
    made_.reset(new uint8_t[size_t(g.batch * g.pixels() * g.channels)]);
    codes_ = made_.get();
    const int64_t strips = ceil_div(g.pixels(), STRIP);
    parallel_for(g.batch * strips, threads, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t image = task / strips * g.pixels() * g.channels, start = task % strips * STRIP;
        const int64_t n = std::min(STRIP, g.pixels() - start);
        for (int64_t c = 0; c < g.channels; ++c) {
          const uint8_t* from = x + image + c * g.pixels() + start;
          uint8_t* to = made_.get() + image + start * g.channels + c;
          for (int64_t p = 0; p < n; ++p) to[p * g.channels] = from[p];
        }
      }
    });
  }
  const uint8_t* codes() const { return codes_; }

 private:
  const uint8_t* codes_;
  std::unique_ptr<uint8_t[]> made_;
};

void by_panels(const PackedWeight& weight, const Kernels& kernels, const Products& products, const uint8_t* x,
               const Geometry& g, const Values& values, int threads) {
  const Panels panels(weight, kernels, products, threads);
  const int64_t width = weight.cell_bytes(), c = weight.channels, count = g.batch * g.pixels() * g.groups;
  const int plan = weight.planes() / 2;
  const bool as_is = weight.planes() == 1 && width == c;
  std::unique_ptr<uint8_t[]> made(as_is ? nullptr : new uint8_t[size_t(count * width)]);
  std::vector<int32_t> sums(size_t(count), 0);
  parallel_for(ceil_div(count, STRIP), threads, [&](int64_t first, int64_t last) {
    for (int64_t cell = first * STRIP; cell < std::min(count, last * STRIP); ++cell) {
      sums[size_t(cell)] = kernels.total(x + cell * c, c);
      if (!as_is) products.arrange[plan](x + cell * c, c, made.get() + cell * width, width);
    }
  });
  const uint8_t* cells = as_is ? x : made.get();
  const int32_t x_zero = values.x_zero[0];  // of the padding, which stands for 0.0
  std::vector<uint8_t> nothing(size_t(width), 0);
  const std::vector<uint8_t> zeros(size_t(c), static_cast<uint8_t>(x_zero));
  products.arrange[plan](zeros.data(), c, nothing.data(), width);
  multiply(weight, panels, products, values, threads,
           [&](int64_t group, int64_t first, int rows, const uint8_t** at, int32_t* x_sums) {
             for (int i = 0; i < rows; ++i) {
               const int64_t image = (first + i) / g.out_pixels() * g.pixels();
               int32_t sum = 0;
               g.for_each_tap((first + i) % g.out_pixels(), [&](int64_t tap, int64_t pixel) {
                 const int64_t cell = (image + pixel) * g.groups + group;
                 at[tap * rows + i] = pixel < 0 ? nothing.data() : cells + cell * width;
                 sum += pixel < 0 ? int32_t(c) * x_zero : sums[size_t(cell)];
               });
               x_sums[i] = sum;
             }
           });
}

// The codes of a depthwise weight less their zeros, tap by tap.
std::vector<int16_t> centred(const PackedWeight& weight, const Kernels& kernels) {
  const int64_t taps = weight.taps, channels = weight.groups;
  std::vector<int16_t> result(size_t(taps * channels));
  std::vector<uint8_t> codes(size_t(taps), 0);
  for (int64_t c = 0; c < channels; ++c) {
    kernels.unpack[weight.stored](weight.words + c * weight.row_bytes, codes.data(), taps);
    for (int64_t tap = 0; tap < taps; ++tap)
      result[size_t(tap * channels + c)] = int16_t(codes[size_t(tap)] - weight.zero[c]);
  }
  return result;
}

void depthwise(const PackedWeight& weight, const Kernels& kernels, const Products& products, const uint8_t* x,
               const Geometry& g, const Values& values, int threads) {
  const std::vector<int16_t> centre = centred(weight, kernels);
  const std::vector<uint8_t> nothing(size_t(g.channels), uint8_t(values.x_zero[0]));
  const int64_t size = values.dtype == TTAQ_FLOAT32 ? 4 : 2;
  parallel_for(values.rows, threads, [&](int64_t first, int64_t last) {
    std::vector<const uint8_t*> cells(size_t(g.taps()));
    std::vector<int32_t> sums(size_t(g.channels));
    std::vector<uint8_t> row(size_t(values.output == 1 ? 0 : g.channels * size));
    for (int64_t m = first; m < last; ++m) {
      const int64_t image = m / g.out_pixels() * g.pixels();
      g.for_each_tap(m % g.out_pixels(), [&](int64_t tap, int64_t pixel) {
        cells[size_t(tap)] = pixel < 0 ? nothing.data() : x + (image + pixel) * g.channels;
      });
      products.depthwise(cells.data(), centre.data(), g.taps(), g.channels, values.x_zero[0], sums.data());
      const int64_t start = m / values.pixels * values.image + m % values.pixels * values.pixel;
      uint8_t* y = static_cast<uint8_t*>(values.y) + start * size;
      void* to = row.empty() ? y : row.data();
      products.scale_rows[values.dtype](sums.data(), weight.scale, values.bias, values.x_scale[0], g.channels, to);
      for (int64_t c = 0; !row.empty() && c < g.channels; ++c)
        memcpy(y + c * values.output * size, row.data() + c * size, size_t(size));
    }
  });
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_packed_conv2d(const uint8_t* x, const uint8_t* words, const float* scale, const int32_t* zero,
                           const float* bias, const float* x_scale, const int32_t* x_zero, void* y, int dtype, int bits,
                           int channels_last, const int64_t* geometry, int threads, int level) {
  const Kernels* kernels = kernels_of(level);
  const Products* products = products_of(level);
  if (!kernels || !products) return TTAQ_BAD_LEVEL;
  if (dtype < TTAQ_FLOAT32 || dtype > TTAQ_FLOAT16) return TTAQ_BAD_DTYPE;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return TTAQ_BAD_BITS;
  Geometry g;
  memcpy(&g, geometry, sizeof g);
  const int64_t per_group = g.channels / g.groups;
  const PackedWeight weight{words, ceil_div(g.taps() * per_group * bits, 8), bits, bits == 3 ? 4 : bits, g.groups,
                            g.outputs / g.groups, g.taps(), per_group, 1, scale, zero};
  const int64_t image = g.outputs * g.out_pixels();
  const Values values{x_scale, x_zero, false, bias, y, dtype, g.batch * g.out_pixels(), g.out_pixels(), image,
                      channels_last ? g.outputs : 1, channels_last ? 1 : g.out_pixels()};
  const Pixels pixels(x, g, channels_last != 0, threads);
  const bool alone = g.groups == g.channels && g.outputs == g.channels && g.channels > 1;
  (alone ? depthwise : by_panels)(weight, *kernels, *products, pixels.codes(), g, values, threads);
  return TTAQ_OK;
}
