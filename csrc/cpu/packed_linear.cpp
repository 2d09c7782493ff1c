// The linear layer of activation codes on packed weights.
#include <string.h>

#include "arguments.h"
#include "integer_product.h"

namespace ttaq {
namespace {

constexpr int FEW = 4;  // rows of activations up to which the words are read as they lie

// Makes cells of rows of codes and multiplies by tiles.
void by_panels(const PackedWeight& weight, const Kernels& kernels, const Products& products, const uint8_t* x,
               int64_t stride, const Values& values, int threads) {
  const Panels panels(weight, kernels, products, threads);
  const int64_t width = weight.cell_bytes(), k = weight.channels;
  const bool as_is = weight.planes() == 1 && width == k;
  uint8_t* made = as_is ? nullptr : kept(FOR_CELLS, values.rows * width);
  std::vector<int32_t> sums(size_t(values.rows * weight.pieces), 0);
  parallel_for(values.rows, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      for (int64_t piece = 0; piece < weight.pieces; ++piece)
        sums[size_t(row * weight.pieces + piece)] =
            kernels.total(x + row * stride + k / weight.pieces * piece, k / weight.pieces);
    if (!as_is)
      products.arrange[weight.planes() / 2](x + first * stride, stride, last - first, k, made + first * width,
                                            width, nullptr);
  });
  const uint8_t* cells = as_is ? x : made;
  multiply(weight, panels, products, {{0}, 1}, values, threads,
           [&](int64_t, int64_t first, int rows, const uint8_t** at, int32_t* x_sums) {
             for (int i = 0; i < rows; ++i) {
               at[i] = cells + (first + i) * (as_is ? stride : width);
               for (int64_t piece = 0; piece < weight.pieces; ++piece)
                 x_sums[piece * rows + i] = sums[size_t((first + i) * weight.pieces + piece)];
             }
           });
}

// Multiplies a few rows of codes with the words as they lie: making panels would cost more than it saves.
void by_rows(const PackedWeight& weight, const Kernels& kernels, const Products& products, const uint8_t* x,
             int64_t stride, const Values& values, int threads) {
  constexpr int64_t ROW = MOST_PANELS * PANEL_OUTPUTS;
  const int planes = weight.planes(), inputs = int(values.rows);
  const int64_t k = weight.channels, bytes = ceil_div(k * weight.bits, 8), stream = ceil_div(bytes, 64) * 64;
  std::vector<uint8_t> codes(size_t(inputs * planes * stream), 0);
  int32_t x_sums[FEW], x_zero[FEW];
  float x_scale[FEW];
  for (int m = 0; m < inputs; ++m) {
    products.spread[planes / 2](x + m * stride, k, &codes[size_t(m * planes * stream)], stream);
    x_sums[m] = kernels.total(x + m * stride, k);
    x_scale[m] = values.x_scale[values.token ? m : 0];
    x_zero[m] = values.x_zero[values.token ? m : 0];
  }
  const Follows& follows = values.follows;
  parallel_for(ceil_div(weight.outputs, ROW), threads, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> wide(size_t(weight.bits == weight.stored ? 0 : 4 * bytes));
    int32_t sums[FEW * ROW], shift[ROW], code_sums[ROW], block[16];
    for (int64_t first = begin * ROW; first < std::min(weight.outputs, end * ROW); first += ROW) {
      const int outputs = int(std::min(ROW, weight.outputs - first));
      for (int j = 0; j < outputs; j += 4) {
        const int rows = std::min(4, outputs - j);
        const uint8_t* words[4];
        for (int i = 0; i < rows; ++i) {
          words[i] = weight.words + (first + j + i) * weight.row_bytes;
          if (wide.empty()) continue;
          products.widen(words[i], k, &wide[size_t(i * bytes)]);
          words[i] = &wide[size_t(i * bytes)];
        }
        products.dot[planes / 2](words, rows, bytes, codes.data(), inputs, planes * stream, block, code_sums + j);
        for (int i = 0; i < rows; ++i) {
          for (int m = 0; m < inputs; ++m) sums[m * ROW + j + i] = block[4 * i + m];
          shift[j + i] = int32_t(weight.zero[first + j + i] - weight.offset());
          code_sums[j + i] = int32_t(uint32_t(code_sums[j + i]) - uint32_t(k) * uint32_t(shift[j + i]));
        }
      }
      void* y[FEW];
      const void* residual[FEW];
      for (int m = 0; m < inputs; ++m) {
        const int64_t at = m * weight.outputs + first;
        y[m] = static_cast<uint8_t*>(values.y) + at * follows.y_bytes();
        residual[m] = follows.residual() + at * follows.bytes();
      }
      follows.count(products.finish[values.dtype](
          {sums, inputs, outputs, shift, code_sums, weight.scale + first, values.bias ? values.bias + first : nullptr,
           x_sums, x_zero, x_scale, nullptr, y, true, true, follows.ending(), first,
           follows.residual() ? residual : nullptr}));
    }
  });
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_packed_linear(const uint8_t* x, int64_t stride, const uint8_t* words, const float* scale,
                           const int32_t* zero, const float* bias, const float* x_scale, const int32_t* x_zero,
                           int token, void* y, int dtype, int bits, int64_t group, int64_t m, int64_t n, int64_t k,
                           const ttaq_ending* given, int threads, int level) {
  const Kernels* kernels = kernels_of(level);
  const Products* products = products_of(level);
  if (!kernels || !products) return TTAQ_BAD_LEVEL;
  if (!is_float(dtype)) return TTAQ_BAD_DTYPE;
  if (!has_width(bits)) return TTAQ_BAD_BITS;
  if (group && (k % group || group * (bits == 3 ? 4 : bits) % 32)) return TTAQ_BAD_GROUP;
  const PackedWeight weight{words, ceil_div(k * bits, 8), bits, bits == 3 ? 4 : bits, 1, n, 1, k,
                            group ? k / group : 1, scale, zero};
  const Follows follows(given, dtype);
  const Values values{x_scale, x_zero, token != 0, bias, y, dtype, m, 1, n, 0, 1, follows};
  const bool few = m <= FEW && products->dot[0] && weight.pieces == 1;
  try {
    (few ? by_rows : by_panels)(weight, *kernels, *products, x, stride, values, threads);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}
