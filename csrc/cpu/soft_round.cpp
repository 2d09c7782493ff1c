// Learned rounding: checks, memory and threads around the loops of soft_round_kernels.cpp.
#include <math.h>

#include <algorithm>
#include <new>
#include <vector>

#include "../ttaq_native.h"
#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace ttaq {
namespace {

constexpr int64_t TALL = 16;  // lines of a strip: as many squares are added in float32, the rest in float64

// The weight as lines of `width` elements, `lines` to a group: one line where no columns are measured.
struct Matrix {
  int64_t groups, lines, width, inputs, stride;

  int64_t across() const { return ceil_div(width, WIDTH); }
  int64_t strips() const { return ceil_div(lines, TALL); }
  int64_t tasks() const { return groups * strips() * across(); }
  int64_t column_of(int64_t position) const { return position / stride % inputs; }
};

// The checked arguments, resolved.
struct Call {
  const Kernels* kernels;
  const float *w, *v, *scale;
  const void* zero;
  int zero_is_int;
  float beta;
  Range range;
  int64_t channels, inner;
  Matrix matrix;

  float rounded_zero(int64_t channel) const {
    return zero_is_int ? float(static_cast<const int32_t*>(zero)[channel])
                       : rintf(static_cast<const float*>(zero)[channel]);
  }

  // Calls body(task, strip, position, start, weights) for all elements, in parallel and in order in a task: those of a
  // line from its `position` on, which begin at element `start`. Strips are numbered through all groups.
  template <class Body>
  void for_each_piece(int threads, const Body& body) const {
    parallel_for(matrix.tasks(), threads, [&](int64_t first, int64_t last) {
      float scales[WIDTH], zeros[WIDTH];
      for (int64_t task = first; task < last; ++task) {
        const int64_t strip = task / matrix.across(), position = task % matrix.across() * WIDTH;
        const int64_t size = std::min(WIDTH, matrix.width - position), group = strip / matrix.strips();
        const int64_t top = strip % matrix.strips() * TALL, bottom = std::min(top + TALL, matrix.lines);
        for (int64_t line = top; line < bottom; ++line) {
          const int64_t start = (group * matrix.lines + line) * matrix.width + position;
          for_each_channel(start, size, channels, inner, [&](int64_t at, int64_t count, int64_t channel) {
            std::fill_n(scales + at, count, scale[channel]);
            std::fill_n(zeros + at, count, rounded_zero(channel));
          });
          body(task, strip, position, start, SoftWeights{w + start, v + start, scales, zeros, size, beta, range});
        }
      }
    });
  }
};

Matrix matrix_of(int64_t elements, int64_t outputs, int64_t conv_groups, int64_t inputs, int64_t stride) {
  if (!conv_groups) return {1, 1, elements, 1, 1};
  return {conv_groups, outputs / conv_groups, elements / outputs, inputs, stride};
}

// Adds up the strips and the taps of each column, in the order of memory.
void fold(const Matrix& matrix, const std::vector<float>& part, float* energy) {
  std::vector<double> sums(size_t(matrix.inputs));
  for (int64_t group = 0; group < matrix.groups; ++group) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t strip = 0; strip < matrix.strips(); ++strip) {
      const float* line = &part[size_t((group * matrix.strips() + strip) * matrix.width)];
      for (int64_t i = 0; i < matrix.width; ++i) sums[size_t(matrix.column_of(i))] += line[i];
    }
    std::copy(sums.begin(), sums.end(), energy + group * matrix.inputs);
  }
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_soft_round(const float* w, const float* v, const float* scale, const void* zero, int zero_is_int,
                        const float* beta, float* y, float* penalty, float* energy, int qmin, int qmax, int64_t outer,
                        int64_t channels, int64_t inner, int64_t outputs, int64_t conv_groups, int64_t inputs,
                        int64_t stride, int threads, int level) {
  const int64_t elements = outer * channels * inner;
  const Call call{kernels_of(level), w, v, scale, zero, zero_is_int, *beta, {float(qmin), float(qmax)}, channels,
                  inner, matrix_of(elements, outputs, conv_groups, inputs, stride)};
  if (!call.kernels) return TTAQ_BAD_LEVEL;
  const Matrix& matrix = call.matrix;
  try {
    std::vector<double> penalties(size_t(matrix.tasks()), 0.0);
    std::vector<float> squares(size_t(conv_groups ? matrix.groups * matrix.strips() * matrix.width : 0), 0.0f);
    advise_huge_pages(y, elements * 4);
    call.for_each_piece(threads, [&](int64_t task, int64_t strip, int64_t position, int64_t start,
                                     const SoftWeights& weights) {
      float* sums = conv_groups ? &squares[size_t(strip * matrix.width + position)] : nullptr;
      call.kernels->soft_round(weights, y + start, &penalties[size_t(task)], sums);
    });
    double total = 0;  // in the order of memory
    for (const double part : penalties) total += part;
    *penalty = float(total);
    if (conv_groups) fold(matrix, squares, energy);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}

int ttaq_cpu_soft_round_backward(const float* grad, const float* dpenalty, const float* denergy, const float* w,
                                 const float* v, const float* scale, const void* zero, int zero_is_int,
                                 const float* beta, float* dv, int qmin, int qmax, int64_t outer, int64_t channels,
                                 int64_t inner, int64_t outputs, int64_t conv_groups, int64_t inputs, int64_t stride,
                                 int threads, int level) {
  const int64_t elements = outer * channels * inner;
  const Call call{kernels_of(level), w, v, scale, zero, zero_is_int, *beta, {float(qmin), float(qmax)}, channels,
                  inner, matrix_of(elements, outputs, conv_groups, inputs, stride)};
  if (!call.kernels) return TTAQ_BAD_LEVEL;
  const Matrix& matrix = call.matrix;
  try {
    std::vector<float> by_position(size_t(conv_groups ? matrix.groups * matrix.width : 0));
    for (size_t i = 0; i < by_position.size(); ++i) {
      const int64_t group = int64_t(i) / matrix.width, position = int64_t(i) % matrix.width;
      by_position[i] = denergy[group * matrix.inputs + matrix.column_of(position)];
    }
    advise_huge_pages(dv, elements * 4);
    call.for_each_piece(threads, [&](int64_t, int64_t strip, int64_t position, int64_t start,
                                     const SoftWeights& weights) {
      const int64_t group = strip / matrix.strips();
      const float* column = conv_groups ? &by_position[size_t(group * matrix.width + position)] : nullptr;
      call.kernels->soft_round_backward(grad + start, *dpenalty, column, weights, dv + start);
    });
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}
