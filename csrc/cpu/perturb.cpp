// Fake quantisation under a random perturbation: checks, memory and threads around the loops of kernels.cpp.
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

static_assert(TASK % DRAWN == 0, "a task draws whole blocks of numbers");

// The spreads in the order of memory: element e has that of channel e / inner % channels.
struct Spreads {
  const float* values;
  int64_t channels, inner;

  void fill(int64_t start, int64_t n, float* spreads) const {
    for_each_channel(start, n, channels, inner, [&](int64_t at, int64_t count, int64_t channel) {
      std::fill_n(spreads + at, count, values[channel]);
    });
  }
};

// The checked arguments, resolved.
struct Call {
  const Kernels* kernels;
  int kind, dtype;
  Range range;
  Spreads spreads;
  int64_t elements;
  float scale, zero;
  uint64_t seed;

  int64_t width() const { return bytes_of(dtype); }
  const char* at(const void* start, int64_t i) const { return static_cast<const char*>(start) + i * width(); }
  char* at(void* start, int64_t i) const { return static_cast<char*>(start) + i * width(); }
  int64_t tasks() const { return ceil_div(elements, TASK); }

  // Calls body(task, start, n, numbers, spreads) for all elements, in parallel, DRAWN at a time and in order in a task.
  template <class Body>
  void for_each_block(int threads, const Body& body) const {
    parallel_for(tasks(), threads, [&](int64_t first, int64_t last) {
      float numbers[DRAWN], wanted[DRAWN];
      if (spreads.channels == 1) std::fill_n(wanted, DRAWN, *spreads.values);
      for (int64_t start = first * TASK; start < std::min(elements, last * TASK); start += DRAWN) {
        const int64_t n = std::min(DRAWN, elements - start);
        if (spreads.channels > 1) spreads.fill(start, n, wanted);
        kernels->draw[kind](seed, start / DRAWN, numbers);
        body(start / TASK, start, n, numbers, wanted);
      }
    });
  }
};

int error_of(int kind, int dtype, int level) {
  if (!is_float(dtype)) return TTAQ_BAD_DTYPE;
  if (kind < TTAQ_DROP || kind > TTAQ_GAUSS) return TTAQ_BAD_KIND;
  return kernels_of(level) ? TTAQ_OK : TTAQ_BAD_LEVEL;
}

float rounded(const void* zero, int zero_is_int) {
  return zero_is_int ? float(*static_cast<const int32_t*>(zero)) : rintf(*static_cast<const float*>(zero));
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_perturbed_fake_quant(const void* x, void* y, const float* scale, const void* zero, int zero_is_int,
                                  const float* spread, const int64_t* seed, int kind, int dtype, int qmin, int qmax,
                                  int64_t outer, int64_t channels, int64_t inner, int threads, int level) {
  if (const int error = error_of(kind, dtype, level)) return error;
  const Call call{kernels_of(level), kind, dtype, {float(qmin), float(qmax)}, {spread, channels, inner},
                  outer * channels * inner, *scale, rounded(zero, zero_is_int), uint64_t(*seed)};
  advise_huge_pages(y, call.elements * call.width());
  const auto loop = call.kernels->perturb[kind][dtype];
  call.for_each_block(threads, [&](int64_t, int64_t start, int64_t n, const float* numbers, const float* spreads) {
    loop(call.at(x, start), call.at(y, start), n, numbers, spreads, call.scale, call.zero, call.range);
  });
  return TTAQ_OK;
}

int ttaq_cpu_perturbed_fake_quant_backward(const void* grad, const void* x, void* dx, const float* scale,
                                           const void* zero, int zero_is_int, const float* spread,
                                           const int64_t* seed, float* dscale, float* dzero, int kind, int dtype,
                                           int qmin, int qmax, int64_t outer, int64_t channels, int64_t inner,
                                           int threads, int level) {
  if (const int error = error_of(kind, dtype, level)) return error;
  const Call call{kernels_of(level), kind, dtype, {float(qmin), float(qmax)}, {spread, channels, inner},
                  outer * channels * inner, *scale, rounded(zero, zero_is_int), uint64_t(*seed)};
  try {
    std::vector<double> scales(size_t(call.tasks()), 0.0), zeros(size_t(call.tasks()), 0.0);
    advise_huge_pages(dx, call.elements * call.width());
    const auto loop = call.kernels->perturb_backward[kind][dtype];
    call.for_each_block(threads, [&](int64_t task, int64_t start, int64_t n, const float* numbers,
                                     const float* spreads) {
      loop(call.at(grad, start), call.at(x, start), call.at(dx, start), n, numbers, spreads, call.scale, call.zero,
           call.range, &scales[size_t(task)], &zeros[size_t(task)]);
    });
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
