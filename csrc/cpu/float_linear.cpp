// Linear layers on floats and packed weights: blocks and threads around the loops of float_kernels.cpp. Weights become
// float a tile at a time, in memory of the thread that multiplies with it.
#include <algorithm>
#include <memory>
#include <new>

#include "../ttaq_native.h"
#include "float_kernels.h"
#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace ttaq {
namespace {

constexpr int64_t MOST_ROWS = 192;  // rows of activations or gradients of a task
constexpr int64_t OUTPUTS = 48;     // lines of a tile of the forward,
constexpr int64_t DEPTH = 768;      // and its columns at most
constexpr int64_t LINES = 128;      // lines of a tile of the backward at most
constexpr int64_t LINE = DEPTH + PADDING;  // lines a page apart would push one another out of the cache
constexpr int64_t CODE_TASK = 32;   // rows of codes of a task

struct Bytes {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], Bytes>;

Floats allocate(int64_t n) {
  return Floats(static_cast<float*>(::operator new[](size_t(n) * sizeof(float), std::align_val_t(64))));
}

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

int width(int dtype) { return dtype == TTAQ_FLOAT32 ? 4 : 2; }

// Rows of float32, with zeros behind up to a multiple of `unit`: the caller's where they are that, else a copy.
class Rows {
 public:
  Rows(const FloatKernels& kernels, const void* x, int64_t stride, int64_t m, int64_t k, int64_t unit, int dtype,
       int threads)
      : first_(static_cast<const float*>(x)), stride_(stride) {
    if (dtype == TTAQ_FLOAT32 && k % unit == 0) return;
    stride_ = ceil_div(k, unit) * unit;
    copy_ = allocate(m * stride_);
    float* to = copy_.get();
    first_ = to;
    parallel_for(m, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernels.widen[dtype](static_cast<const char*>(x) + row * stride * width(dtype), k, to + row * stride_);
        std::fill(to + row * stride_ + k, to + (row + 1) * stride_, 0.0f);
      }
    });
  }

  void point(int64_t row, int64_t m, const float** rows) const {
    for (int64_t i = 0; i < m; ++i) rows[i] = first_ + (row + i) * stride_;
  }
  const float* row(int64_t i) const { return first_ + i * stride_; }

 private:
  Floats copy_;
  const float* first_;
  int64_t stride_;
};

// The checked arguments, resolved.
struct Call {
  const FloatKernels* kernels;
  Weights weights;
  const float* bias;
  void* y;
  int bits, y_dtype;
  int64_t m, n, k;
  int threads;
};

int resolve(Call& call, int level, int x_dtype) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return TTAQ_BAD_LEVEL;
  call.kernels = kernels->floats;
  if (x_dtype < TTAQ_FLOAT32 || x_dtype > TTAQ_FLOAT16) return TTAQ_BAD_DTYPE;
  if (call.y_dtype < TTAQ_FLOAT32 || call.y_dtype > TTAQ_FLOAT16) return TTAQ_BAD_DTYPE;
  if (call.bits < 2 || call.bits > 8 || !call.kernels->dequantise[call.bits]) return TTAQ_BAD_BITS;
  return TTAQ_OK;
}

Weights weights_of(const uint8_t* words, const float* scale, const int32_t* zero, int bits, int64_t group, int64_t n,
                   int64_t k) {
  const int64_t row_bytes = ceil_div(k * bits, 8), whole = std::max<int64_t>(1, k);
  return {words, words + n * row_bytes, row_bytes, scale, zero, group ? group : whole, group ? k / group : 1};
}

// One row of activations against weights without groups: sums of codes, which are scaled once.
void multiply_row(const Call& call, const float* x) {
  const Floats spread = allocate(call.k + LONGEST_BLOCK);
  call.kernels->spread(x, call.k, spread.get());
  parallel_for(ceil_div(call.n, CODE_TASK), call.threads, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task * CODE_TASK, rows = std::min(CODE_TASK, call.n - row);
      float sums[CODE_TASK];
      call.kernels->row_sums[call.bits](call.weights, row, rows, spread.get(), call.k, sums);
      for (int64_t i = 0; i < rows; ++i)
        sums[i] = sums[i] * call.weights.scale[row + i] + (call.bias ? call.bias[row + i] : 0.0f);
      call.kernels->narrow[call.y_dtype](sums, rows, static_cast<char*>(call.y) + row * width(call.y_dtype));
    }
  });
}

// A block of rows of activations against a block of outputs.
void multiply_block(const Call& call, const Rows& x, int64_t row, int64_t m, int64_t output, int64_t n) {
  alignas(64) float tile[OUTPUTS * LINE], sums[MOST_ROWS * OUTPUTS];
  const float* rows[MOST_ROWS];
  x.point(row, m, rows);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) sums[i * OUTPUTS + j] = call.bias ? call.bias[output + j] : 0.0f;
  const int64_t lines = ceil_div(n, TOGETHER) * TOGETHER;
  const Parts depth(call.k, DEPTH, PADDING);
  for (int64_t part = 0; part < depth.count; ++part) {
    const int64_t start = depth.start(part), length = depth.length(part);
    const int64_t padded = ceil_div(length, PADDING) * PADDING;
    call.kernels->dequantise[call.bits](call.weights, output, n, start, length, tile, LINE);
    for (int64_t line = n; line < lines; ++line) std::fill_n(tile + line * LINE, padded, 0.0f);
    call.kernels->dots(rows, m, start, padded, tile, LINE, lines, sums, OUTPUTS);
  }
  for (int64_t i = 0; i < m; ++i) {
    char* to = static_cast<char*>(call.y) + ((row + i) * call.n + output) * width(call.y_dtype);
    call.kernels->narrow[call.y_dtype](sums + i * OUTPUTS, n, to);
  }
}

// A block of rows of gradients against a panel of inputs.
void multiply_panel(const Call& call, const Rows& grad, int64_t row, int64_t m, int64_t input) {
  alignas(64) float tile[LINES * PANEL], sums[MOST_ROWS * PANEL];
  const float* rows[MOST_ROWS];
  grad.point(row, m, rows);
  std::fill_n(sums, m * PANEL, 0.0f);
  const int64_t columns = std::min(PANEL, call.k - input);
  const int64_t padded = ceil_div(columns, PADDING) * PADDING;
  const Parts depth(call.n, LINES, 1);
  for (int64_t part = 0; part < depth.count; ++part) {
    const int64_t start = depth.start(part), length = depth.length(part);
    call.kernels->dequantise[call.bits](call.weights, start, length, input, columns, tile, PANEL);
    for (int64_t line = 0; padded < PANEL && line < length; ++line)
      std::fill(tile + line * PANEL + padded, tile + (line + 1) * PANEL, 0.0f);
    call.kernels->multiply(rows, m, start, length, tile, sums);
  }
  for (int64_t i = 0; i < m; ++i) {
    char* to = static_cast<char*>(call.y) + ((row + i) * call.k + input) * width(call.y_dtype);
    call.kernels->narrow[call.y_dtype](sums + i * PANEL, columns, to);
  }
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_packed_linear_floats(const void* x, int64_t stride, const uint8_t* words, const float* scale,
                                  const int32_t* zero, const float* bias, void* y, int bits, int64_t group, int64_t m,
                                  int64_t n, int64_t k, int x_dtype, int y_dtype, int threads, int level) {
  Call call{nullptr, weights_of(words, scale, zero, bits, group, n, k), bias, y, bits, y_dtype, m, n, k, threads};
  if (const int error = resolve(call, level, x_dtype)) return error;
  try {
    const Rows rows(*call.kernels, x, stride, m, k, PADDING, x_dtype, threads);
    if (m == 1 && !group) {
      multiply_row(call, rows.row(0));
      return TTAQ_OK;
    }
    const Parts across(m, MOST_ROWS, 1);
    const int64_t down = ceil_div(n, OUTPUTS);
    parallel_for(across.count * down, threads, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t part = task / down, output = task % down * OUTPUTS;
        multiply_block(call, rows, across.start(part), across.length(part), output, std::min(OUTPUTS, n - output));
      }
    });
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}

int ttaq_cpu_packed_linear_backward(const void* grad, int64_t stride, const uint8_t* words, const float* scale,
                                    const int32_t* zero, void* dx, int bits, int64_t group, int64_t m, int64_t n,
                                    int64_t k, int dtype, int threads, int level) {
  Call call{nullptr, weights_of(words, scale, zero, bits, group, n, k), nullptr, dx, bits, dtype, m, n, k, threads};
  if (const int error = resolve(call, level, dtype)) return error;
  try {
    const Rows rows(*call.kernels, grad, stride, m, n, 1, dtype, threads);
    const Parts across(m, MOST_ROWS, 1);
    const int64_t down = ceil_div(k, PANEL);
    parallel_for(across.count * down, threads, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t part = task / down;
        multiply_panel(call, rows, across.start(part), across.length(part), task % down * PANEL);
      }
    });
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}
