// Fake quantisation, its gradients, and codes: checks, memory and threads around the loops of kernels.cpp.
#include <atomic>
#include <new>
#include <vector>

#include "arguments.h"
#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace ttaq {
namespace {

// What the three functions share: their checked arguments, resolved.
struct Call {
  const Kernels* kernels;
  int dtype;
  Range range;
  int64_t elements;

  int error() const {
    if (!is_float(dtype)) return TTAQ_BAD_DTYPE;
    return kernels ? TTAQ_OK : TTAQ_BAD_LEVEL;
  }
  int64_t width() const { return bytes_of(dtype); }
  const char* at(const void* start, int64_t i) const { return static_cast<const char*>(start) + i * width(); }
  char* at(void* start, int64_t i) const { return static_cast<char*>(start) + i * width(); }
};

// Calls body(run, scale, zero) for every run of elements, in parallel.
template <class Body>
void for_each_run(const Cut& cut, const Parameters& parameters, int threads, const Body& body) {
  parallel_for(cut.tasks(), threads, [&](int64_t first, int64_t last) {
    cut.walk(first, last, [&](const Run& run) {
      body(run, parameters.scale + run.parameter, parameters.zero + run.parameter);
    });
  });
}

void forward(const Call& call, const Cut& cut, const Parameters& parameters, const void* x, void* y, int threads) {
  advise_huge_pages(y, call.elements * call.width());
  const auto loop = call.kernels->forward[cut.columns()][call.dtype];
  for_each_run(cut, parameters, threads, [&](const Run& run, const float* scale, const float* zero) {
    loop(call.at(x, run.start), call.at(y, run.start), run.block, scale, zero, call.range);
  });
}

void backward(const Call& call, const Cut& cut, const Parameters& parameters, const void* grad, const void* x,
              void* dx, float* dscale, float* dzero, int threads) {
  advise_huge_pages(dx, call.elements * call.width());
  std::vector<double> scales(size_t(cut.parts()), 0.0), zeros(size_t(cut.parts()), 0.0);
  const auto loop = call.kernels->backward[cut.columns()][call.dtype];
  for_each_run(cut, parameters, threads, [&](const Run& run, const float* scale, const float* zero) {
    loop(call.at(grad, run.start), call.at(x, run.start), call.at(dx, run.start), run.block, scale, zero, call.range,
         &scales[size_t(run.part)], &zeros[size_t(run.part)]);
  });
  cut.fold(scales, dscale);
  cut.fold(zeros, dzero);
}

int64_t codes(const Call& call, const Cut& cut, const Parameters& parameters, const void* x, uint8_t* codes,
              int threads) {
  advise_huge_pages(codes, call.elements);
  std::atomic<int64_t> nonfinite{0};
  const auto loop = call.kernels->codes[cut.columns()][call.dtype];
  for_each_run(cut, parameters, threads, [&](const Run& run, const float* scale, const float* zero) {
    nonfinite += loop(call.at(x, run.start), codes + run.start, run.block, scale, zero, call.range);
  });
  return nonfinite;
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_fake_quant(const void* x, void* y, const float* scale, const void* zero, int zero_is_int, int dtype,
                        int qmin, int qmax, int64_t outer, int64_t channels, int64_t inner, int threads, int level) {
  const Call call{kernels_of(level), dtype, {float(qmin), float(qmax)}, outer * channels * inner};
  if (call.error() || call.elements == 0) return call.error();
  try {
    const Cut cut(outer, channels, inner);
    forward(call, cut, Parameters(cut, scale, zero, zero_is_int), x, y, threads);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}

int ttaq_cpu_fake_quant_backward(const void* grad, const void* x, void* dx, const float* scale, const void* zero,
                                 int zero_is_int, float* dscale, float* dzero, int dtype, int qmin, int qmax,
                                 int64_t outer, int64_t channels, int64_t inner, int threads, int level) {
  const Call call{kernels_of(level), dtype, {float(qmin), float(qmax)}, outer * channels * inner};
  if (call.error()) return call.error();
  std::fill_n(dscale, channels, 0.0f);
  std::fill_n(dzero, channels, 0.0f);
  if (call.elements == 0) return TTAQ_OK;
  try {
    const Cut cut(outer, channels, inner);
    backward(call, cut, Parameters(cut, scale, zero, zero_is_int), grad, x, dx, dscale, dzero, threads);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}

int ttaq_cpu_quantize_codes(const void* x, uint8_t* codes, const float* scale, const void* zero, int zero_is_int,
                            int32_t* nonfinite, int dtype, int qmin, int qmax, int64_t outer, int64_t channels,
                            int64_t inner, int threads, int level) {
  const Call call{kernels_of(level), dtype, {float(qmin), float(qmax)}, outer * channels * inner};
  if (call.error()) return call.error();
  *nonfinite = 0;
  if (call.elements == 0) return TTAQ_OK;
  try {
    const Cut cut(outer, channels, inner);
    const Parameters parameters(cut, scale, zero, zero_is_int);
    *nonfinite = int32_t(std::min<int64_t>(ttaq::codes(call, cut, parameters, x, codes, threads), INT32_MAX));
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}
