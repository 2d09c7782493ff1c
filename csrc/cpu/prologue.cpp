// Alignment, fake quantisation and observation in one pass: checks, memory and threads around prologue_kernels.cpp.
#include <math.h>

#include <algorithm>
#include <new>
#include <vector>

#include "arguments.h"
#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace ttaq {
namespace {

// The values of the channels in the order in which the runs of a cut index them.
std::vector<float> in_order(const Cut& cut, const float* values) {
  std::vector<float> ordered(size_t(cut.parameters()));
  for (int64_t i = 0; i < cut.parameters(); ++i) ordered[size_t(i)] = values[cut.channel(i)];
  return ordered;
}

Grid grid_of(const float* scale, const void* zero, int zero_is_int, int qmin, int qmax) {
  const float origin =
      zero_is_int ? float(*static_cast<const int32_t*>(zero)) : rintf(*static_cast<const float*>(zero));
  return {*scale, origin, {float(qmin), float(qmax)}};
}

int error_of(int dtype, int level) {
  if (!is_float(dtype)) return TTAQ_BAD_DTYPE;
  return kernels_of(level) ? TTAQ_OK : TTAQ_BAD_LEVEL;
}

template <class Body>
void for_each_run(const Cut& cut, int threads, const Body& body) {
  parallel_for(cut.tasks(), threads, [&](int64_t first, int64_t last) { cut.walk(first, last, body); });
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_aligned_fake_quant(const void* x, void* y, const float* gain_, const float* shift_, const float* scale,
                                const void* zero, int zero_is_int, float* seen_, int dtype, int qmin, int qmax,
                                int64_t outer, int64_t channels, int64_t inner, int threads, int level) {
  if (const int error = error_of(dtype, level)) return error;
  const int64_t width = bytes_of(dtype), elements = outer * channels * inner;
  const Grid grid = grid_of(scale, zero, zero_is_int, qmin, qmax);
  if (elements == 0) {
    for (int64_t i = 0; seen_ && i < 5 * channels; ++i)
      seen_[i] = i / channels == 2 ? INFINITY : i / channels == 3 ? -INFINITY : 0;
    return TTAQ_OK;
  }
  try {
    const Cut cut(outer, channels, inner);
    const std::vector<float> gain = in_order(cut, gain_), shift = in_order(cut, shift_);
    const size_t parts = seen_ ? size_t(cut.parts()) : 0;
    std::vector<double> sum(parts, 0.0), squares(parts, 0.0), clipped(parts, 0.0);
    std::vector<float> least(parts, INFINITY), greatest(parts, -INFINITY);
    advise_huge_pages(y, elements * width);
    const Aligned* aligned = kernels_of(level)->aligned;
    const auto plain = aligned->forward[cut.columns()][dtype];
    const auto observed = aligned->observed[cut.columns()][dtype];
    for_each_run(cut, threads, [&](const Run& run) {
      const char* from = static_cast<const char*>(x) + run.start * width;
      char* to = static_cast<char*>(y) + run.start * width;
      const float *g = &gain[size_t(run.parameter)], *s = &shift[size_t(run.parameter)];
      if (!seen_) return plain(from, to, run.block, g, s, grid);
      const size_t at = size_t(run.part);
      observed(from, to, run.block, g, s, grid, {&sum[at], &squares[at], &clipped[at], &least[at], &greatest[at]});
    });
    if (!seen_) return TTAQ_OK;
    cut.fold(sum, seen_);
    cut.fold(squares, seen_ + channels);
    cut.fold(least, INFINITY, [](float a, float b) { return std::min(a, b); }, seen_ + 2 * channels);
    cut.fold(greatest, -INFINITY, [](float a, float b) { return std::max(a, b); }, seen_ + 3 * channels);
    cut.fold(clipped, seen_ + 4 * channels);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}

int ttaq_cpu_aligned_fake_quant_backward(const void* grad, const void* x, void* dx, const float* gain_,
                                         const float* shift_, const float* scale, const void* zero, int zero_is_int,
                                         float* dgain, float* dshift, float* dscale, float* dzero, int dtype,
                                         int qmin, int qmax, int64_t outer, int64_t channels, int64_t inner,
                                         int threads, int level) {
  if (const int error = error_of(dtype, level)) return error;
  const int64_t width = bytes_of(dtype), elements = outer * channels * inner;
  const Grid grid = grid_of(scale, zero, zero_is_int, qmin, qmax);
  std::fill_n(dgain, channels, 0.0f);
  std::fill_n(dshift, channels, 0.0f);
  *dscale = *dzero = 0;
  if (elements == 0) return TTAQ_OK;
  try {
    const Cut cut(outer, channels, inner);
    const std::vector<float> gain = in_order(cut, gain_), shift = in_order(cut, shift_);
    const size_t parts = size_t(cut.parts());
    std::vector<double> gains(parts, 0.0), shifts(parts, 0.0), scales(parts, 0.0), zeros(parts, 0.0);
    advise_huge_pages(dx, elements * width);
    const auto loop = kernels_of(level)->aligned->backward[cut.columns()][dtype];
    for_each_run(cut, threads, [&](const Run& run) {
      const size_t at = size_t(run.part), parameter = size_t(run.parameter);
      const int64_t start = run.start * width;
      loop(static_cast<const char*>(grad) + start, static_cast<const char*>(x) + start,
           static_cast<char*>(dx) + start, run.block, &gain[parameter], &shift[parameter], grid,
           {&gains[at], &shifts[at], &scales[at], &zeros[at]});
    });
    cut.fold(gains, dgain);
    cut.fold(shifts, dshift);
    double total_scale = 0, total_zero = 0;  // in the order of memory
    for (const double part : scales) total_scale += part;
    for (const double part : zeros) total_zero += part;
    *dscale = float(total_scale);
    *dzero = float(total_zero);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}
