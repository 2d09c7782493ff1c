// Codes of activations: a grid for each row, threads and packing around the loops of kernels.cpp.
#include <math.h>

#include <algorithm>
#include <atomic>

#include "arguments.h"
#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace ttaq {
namespace {

constexpr int64_t PART = 4096;  // codes of a row that are made, added and packed at a time

// Writes the grid of a row. A NaN among the bounds becomes the scale; it has no zero.
void measure_row(Range bounds, float qmax, float* scale, int32_t* zero) {
  const float step = (bounds.high - bounds.low) / qmax;
  *scale = step < 1e-8f ? 1e-8f : step;
  const float origin = rintf(-bounds.low / *scale);
  *zero = origin == origin ? int32_t(std::min(std::max(origin, 0.0f), qmax)) : 0;
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_activation_codes(const void* x, int64_t stride, uint8_t* codes, float* scale, int32_t* zero,
                              int32_t* sums, int32_t* nonfinite, int measure, int token, int packed, int dtype,
                              int bits, int64_t rows, int64_t k, int threads, int level) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return TTAQ_BAD_LEVEL;
  if (!is_float(dtype)) return TTAQ_BAD_DTYPE;
  if (bits < 2 || bits > 8 || (packed && !kernels->pack[bits])) return TTAQ_BAD_BITS;
  const Range range{0.0f, float((1 << bits) - 1)};
  const int64_t width = bytes_of(dtype), bytes = packed ? ceil_div(k * bits, 8) : k;
  const bool packs = packed && bits < 8;
  advise_huge_pages(codes, rows * bytes);
  std::atomic<int64_t> bad{0};
  const int64_t together = std::max<int64_t>(1, TASK / std::max<int64_t>(1, k));  // rows of a task
  parallel_for(ceil_div(rows, together), threads, [&](int64_t first, int64_t last) {
    uint8_t part[PART];
    int64_t found = 0;
    for (int64_t row = first * together; row < std::min(rows, last * together); ++row) {
      const char* source = static_cast<const char*>(x) + row * stride * width;
      if (measure) measure_row(kernels->extremes[dtype](source, k), range.high, scale + row, zero + row);
      const int64_t at = measure || token ? row : 0;
      const float origin = float(zero[at]);
      int32_t sum = 0;
      for (int64_t start = 0; start < k; start += PART) {
        const int64_t n = std::min(PART, k - start);
        uint8_t* made = packs ? part : codes + row * bytes + start;
        found += kernels->codes[ROW][dtype](source + start * width, made, {n, 1, 0}, scale + at, &origin, range);
        if (sums) sum += kernels->total(made, n);
        if (packs) kernels->pack[bits](part, codes + row * bytes + start * bits / 8, n);
      }
      if (sums) sums[row] = sum;
    }
    bad += found;
  });
  *nonfinite = int32_t(std::min<int64_t>(bad, INT32_MAX));
  return TTAQ_OK;
}
