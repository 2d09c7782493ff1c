// The inner loops of products of codes, compiled once for each instruction set as kernels.cpp is.
#include "number.h"
#include "product.h"
#include "product_deep.h"
#include "product_finish.h"
#include "product_prepare.h"
#include "product_rows.h"
#include "product_vector.h"

namespace ttaq {
namespace {

template <int PLANES, int PLANE, int ROWS, int COUNT>
inline void add_plane(Vector (&sums)[ROWS][COUNT], const Vector (&words)[COUNT], const uint8_t* const (&x)[ROWS],
                      int64_t at) {
  Vector codes[COUNT];
  for (int j = 0; j < COUNT; ++j) codes[j] = plane<PLANES, PLANE>(words[j]);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    const Vector dword = everywhere(dword_at(x[i] + at + 4 * PLANE));
#pragma GCC unroll 3
    for (int j = 0; j < COUNT; ++j) sums[i][j] = add_products<PLANES>(sums[i][j], dword, codes[j]);
  }
}

template <int PLANES, int ROWS, int PANELS>
__attribute__((noinline)) void integer(const IntegerTile& tile) {
  constexpr int COUNT = PANELS * PER_PANEL;
  Vector sums[ROWS][COUNT];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < COUNT; ++j) sums[i][j] = nothing();
  const uint32_t* word = tile.panels;
  for (int64_t run = 0; run < tile.runs; ++run) {
    const uint8_t* x[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) x[i] = tile.cells[i] + tile.offsets[run];
    for (int64_t at = 0; at < 4 * PLANES * tile.dwords; at += 4 * PLANES, word += PANEL_OUTPUTS) {
      Vector words[COUNT];
#pragma GCC unroll 3
      for (int j = 0; j < COUNT; ++j) words[j] = load(word + j / PER_PANEL * tile.panel + j % PER_PANEL * STEP);
      add_plane<PLANES, 0>(sums, words, x, at);
      if constexpr (PLANES > 1) add_plane<PLANES, 1>(sums, words, x, at);
      if constexpr (PLANES > 2) add_plane<PLANES, 2>(sums, words, x, at);
      if constexpr (PLANES > 2) add_plane<PLANES, 3>(sums, words, x, at);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < COUNT; ++j) store(tile.sums + i * ROW + j * STEP, sums[i][j]);
}

#define ROWS_OF(planes, rows) {OF(planes, rows, 1), OF(planes, rows, 2), OF(planes, rows, 3)}
#define OF(planes, rows, panels) entry<planes, rows, panels>()
#define PLANES_OF(planes)                                                                                           \
  {                                                                                                                 \
    ROWS_OF(planes, 1), ROWS_OF(planes, 2), ROWS_OF(planes, 3), ROWS_OF(planes, 4), ROWS_OF(planes, 5),             \
        ROWS_OF(planes, 6), ROWS_OF(planes, 7), ROWS_OF(planes, 8)                                                  \
  }

template <int PLANES, int ROWS, int PANELS>
constexpr auto entry() -> void (*)(const IntegerTile&) {
  if constexpr (ROWS <= TALLEST && PANELS <= WIDEST)
    return integer<PLANES, ROWS, PANELS>;
  else
    return nullptr;
}

}  // namespace

const Products TTAQ_LEVEL::products = {
    TALLEST, WIDEST, {PLANES_OF(1), PLANES_OF(2), PLANES_OF(4)}, {arrange<1>, arrange<2>, arrange<4>},
    {spread<1>, spread<2>, spread<4>}, interleave, transpose, widen, {finish<float>, finish<bfloat16>, finish<float16>},
    deepen, depthwise, {finish_deep<float>, finish_deep<bfloat16>, finish_deep<float16>}, {dot<1>, dot<2>, dot<4>},
};

}  // namespace ttaq
