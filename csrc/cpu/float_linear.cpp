// Linear layers on floats and packed weights: blocks and threads around the loops of float_kernels.cpp. Weights become
// float a tile at a time, in memory of the thread that multiplies with it.
#include "float_product.h"

namespace ttaq {
namespace {

constexpr int64_t CODE_TASK = 32;  // rows of codes of a task

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
        kernels.widen[dtype](static_cast<const char*>(x) + row * stride * bytes_of(dtype), k, to + row * stride_);
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

  // Writes n values to row `row` of y, `width_of_row` long, from `column` on.
  void write(const float* values, int64_t n, int64_t row, int64_t column, int64_t width_of_row) const {
    kernels->narrow[y_dtype](values, n, static_cast<char*>(y) + (row * width_of_row + column) * bytes_of(y_dtype));
  }
};

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
      call.write(sums, rows, 0, row, call.n);
    }
  });
}

// A block of rows of activations against a block of outputs.
void multiply_block(const Call& call, const Rows& x, int64_t row, int64_t m, int64_t output, int64_t n) {
  alignas(64) float tile[OUTPUTS * LINE], sums[MOST_ROWS * OUTPUTS];
  const float* rows[MOST_ROWS];
  x.point(row, m, rows);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < OUTPUTS; ++j) sums[i * OUTPUTS + j] = call.bias && j < n ? call.bias[output + j] : 0.0f;
  const Parts depth(call.k, DEPTH, PADDING);
  for (int64_t part = 0; part < depth.count; ++part) {
    const int64_t start = depth.start(part), length = depth.length(part);
    const Runs runs{&start, 1, padded(length)};
    add_outputs(*call.kernels, call.weights, call.bits, rows, m, runs, output, n, start, length, tile, sums);
  }
  for (int64_t i = 0; i < m; ++i) call.write(sums + i * OUTPUTS, n, row + i, output, call.n);
}

// A block of rows of gradients against a panel of inputs.
void multiply_panel(const Call& call, const Rows& grad, int64_t row, int64_t m, int64_t input) {
  alignas(64) float tile[LINES * PANEL], sums[MOST_ROWS * PANEL];
  const float* rows[MOST_ROWS];
  grad.point(row, m, rows);
  std::fill_n(sums, m * PANEL, 0.0f);
  const int64_t columns = std::min(PANEL, call.k - input);
  add_inputs(*call.kernels, call.weights, call.bits, rows, m, 0, call.n, input, columns, tile, sums);
  for (int64_t i = 0; i < m; ++i) call.write(sums + i * PANEL, columns, row + i, input, call.k);
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_packed_linear_floats(const void* x, int64_t stride, const uint8_t* words, const float* scale,
                                  const int32_t* zero, const float* bias, void* y, int bits, int64_t group, int64_t m,
                                  int64_t n, int64_t k, int x_dtype, int y_dtype, int threads, int level) {
  Call call{nullptr, weights_of(words, scale, zero, bits, group, n, k), bias, y, bits, y_dtype, m, n, k, threads};
  if (const int error = find(&call.kernels, level, bits)) return error;
  if (!is_float(x_dtype) || !is_float(y_dtype)) return TTAQ_BAD_DTYPE;
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
  if (const int error = find(&call.kernels, level, bits)) return error;
  if (!is_float(dtype)) return TTAQ_BAD_DTYPE;
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
