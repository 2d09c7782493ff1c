// Packing codes into words and back: threads around the loops of kernels.cpp.
#include "arguments.h"
#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace ttaq {
namespace {

// Calls body(first code, first byte, codes) for pieces of rows. Rows without padding are one long row; it is cut where
// eight codes end, which is where a byte ends for every width.
template <class Body>
void for_each_piece(int64_t rows, int64_t k, int bits, int threads, const Body& body) {
  if (k * bits % 8 == 0) {
    k *= rows;
    rows = 1;
  }
  const int64_t pieces = ceil_div(k, TASK), bytes = ceil_div(k * bits, 8);
  parallel_for(rows * pieces, threads, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / pieces, start = task % pieces * TASK;
      body(row * k + start, row * bytes + start * bits / 8, std::min(TASK, k - start));
    }
  });
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_pack_codes(const uint8_t* codes, uint8_t* words, int64_t rows, int64_t k, int bits, int threads,
                        int level) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return TTAQ_BAD_LEVEL;
  if (!has_width(bits)) return TTAQ_BAD_BITS;
  advise_huge_pages(words, rows * ceil_div(k * bits, 8));
  for_each_piece(rows, k, bits, threads, [&](int64_t code, int64_t word, int64_t n) {
    kernels->pack[bits](codes + code, words + word, n);
  });
  return TTAQ_OK;
}

int ttaq_cpu_unpack_codes(const uint8_t* words, uint8_t* codes, int64_t rows, int64_t k, int bits, int threads,
                          int level) {
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return TTAQ_BAD_LEVEL;
  if (!has_width(bits)) return TTAQ_BAD_BITS;
  advise_huge_pages(codes, rows * k);
  for_each_piece(rows, k, bits, threads, [&](int64_t code, int64_t word, int64_t n) {
    kernels->unpack[bits](words + word, codes + code, n);
  });
  return TTAQ_OK;
}
