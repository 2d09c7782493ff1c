// The logarithmic grid: checks, memory and threads around the loops of log2_loops.h.
#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "arguments.h"
#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace ttaq {
namespace {

int error_of(int roots, int dtype, int qmax, int level) {
  if (!is_float(dtype)) return TTAQ_BAD_DTYPE;
  if (roots < 1 || roots > 2 || qmax < 1 || qmax > 63) return TTAQ_BAD_ROOTS;
  return kernels_of(level) ? TTAQ_OK : TTAQ_BAD_LEVEL;
}

// Calls body(task, start, n) for n elements of `width` bytes each, TASK at a time, in parallel.
template <class Body>
void for_each_task(int64_t n, int threads, const Body& body) {
  parallel_for(ceil_div(n, TASK), threads, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) body(task, task * TASK, std::min(TASK, n - task * TASK));
  });
}

const char* at(const void* start, int64_t bytes) { return static_cast<const char*>(start) + bytes; }
char* at(void* start, int64_t bytes) { return static_cast<char*>(start) + bytes; }

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_log2_fake_quant(const void* x, void* y, const float* scale, int dtype, int qmax, int roots, int64_t n,
                             int threads, int level) {
  if (const int error = error_of(roots, dtype, qmax, level)) return error;
  const int64_t width = bytes_of(dtype);
  advise_huge_pages(y, n * width);
  const auto loop = kernels_of(level)->log2_forward[roots - 1][dtype];
  for_each_task(n, threads, [&](int64_t, int64_t start, int64_t size) {
    loop(at(x, start * width), at(y, start * width), size, *scale, qmax);
  });
  return TTAQ_OK;
}

int ttaq_cpu_log2_codes(const void* x, uint8_t* codes, const float* scale, int32_t* nonfinite, int dtype, int qmax,
                        int roots, int64_t n, int threads, int level) {
  if (const int error = error_of(roots, dtype, qmax, level)) return error;
  const int64_t width = bytes_of(dtype);
  std::atomic<int64_t> found{0};
  const auto loop = kernels_of(level)->log2_codes[roots - 1][dtype];
  for_each_task(n, threads, [&](int64_t, int64_t start, int64_t size) {
    found += loop(at(x, start * width), codes + start, size, *scale, qmax);
  });
  *nonfinite = int32_t(std::min<int64_t>(found, INT32_MAX));
  return TTAQ_OK;
}

int ttaq_cpu_log2_fake_quant_backward(const void* grad, const void* x, void* dx, const float* scale, float* dscale,
                                      int dtype, int qmax, int roots, int64_t n, int threads, int level) {
  if (const int error = error_of(roots, dtype, qmax, level)) return error;
  const int64_t width = bytes_of(dtype);
  try {
    std::vector<double> part(size_t(ceil_div(n, TASK)), 0.0);
    advise_huge_pages(dx, n * width);
    const auto loop = kernels_of(level)->log2_backward[roots - 1][dtype];
    for_each_task(n, threads, [&](int64_t task, int64_t start, int64_t size) {
      part[size_t(task)] =
          loop(at(grad, start * width), at(x, start * width), at(dx, start * width), size, *scale, qmax);
    });
    double total = 0;  // in the order of memory
    for (const double one : part) total += one;
    *dscale = float(total);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}
