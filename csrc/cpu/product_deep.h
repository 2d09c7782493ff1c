// The inner loops of convolutions of each channel by itself.
#pragma once

#include "product_vector.h"

namespace ttaq {
namespace {

constexpr int64_t DEEP = 64;  // channels that are convolved together

#if defined(__AVX512VNNI__)

// By four taps and DEEP channels: what the interleaved bytes of four pixels meet in four vectors.
void deepen(const int8_t* weight, int64_t taps, int64_t width, int8_t* deep) {
  for (int64_t tap = 0; tap < (taps + 3) / 4 * 4; ++tap)
    for (int64_t c = 0; c < width; ++c) {
      const int64_t block = (tap / 4 * (width / DEEP) + c / DEEP) * 4 + c % 16 / 4;
      deep[block * DEEP + (c % DEEP / 16 * 4 + c % 4) * 4 + tap % 4] = tap < taps ? weight[tap * width + c] : 0;
    }
}

// Brings the sums of DEEP channels from the order of the interleaved bytes to their own.
inline void store_deep(int32_t* sums, const Vector (&v)[4]) {
  const Vector a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
  const Vector c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  store(sums, _mm512_shuffle_i32x4(a, c, 0x88));
  store(sums + 16, _mm512_shuffle_i32x4(a, c, 0xdd));
  store(sums + 32, _mm512_shuffle_i32x4(b, d, 0x88));
  store(sums + 48, _mm512_shuffle_i32x4(b, d, 0xdd));
}

void depthwise(const uint8_t* cell, const int64_t* offsets, const int8_t* deep, int64_t taps, int64_t width,
               int32_t* sums, int32_t* code_sums) {
  for (int64_t first = 0; first < width; first += DEEP) {
    Vector sum[4], total[4];
    for (int v = 0; v < 4; ++v) sum[v] = total[v] = nothing();
    for (int64_t tap = 0; tap < taps; tap += 4) {
      Vector x[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t)
        x[t] = tap + t < taps ? load((const uint32_t*)(cell + offsets[tap + t] + first)) : nothing();
      const Vector a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
      const Vector c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
      const Vector mixed[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d),
                               _mm512_unpackhi_epi16(b, d)};
      const int8_t* w = deep + (tap / 4 * (width / DEEP) + first / DEEP) * 4 * DEEP;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        sum[v] = add_products<1>(sum[v], mixed[v], load((const uint32_t*)(w + v * DEEP)));
        total[v] = add_products<1>(total[v], mixed[v], everywhere(0x01010101));
      }
    }
    store_deep(sums + first, sum);
    store_deep(code_sums + first, total);
  }
}

#else

void deepen(const int8_t* weight, int64_t taps, int64_t width, int8_t* deep) {
  memcpy(deep, weight, size_t(taps * width));
}

void depthwise(const uint8_t* cell, const int64_t* offsets, const int8_t* deep, int64_t taps, int64_t width,
               int32_t* sums, int32_t* code_sums) {
  for (int64_t first = 0; first < width; first += DEEP) {
    int32_t sum[DEEP] = {}, total[DEEP] = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* x = cell + offsets[tap] + first;
      const int8_t* w = deep + tap * width + first;
#pragma omp simd
      for (int64_t c = 0; c < DEEP; ++c) {
        sum[c] += int32_t(x[c]) * int32_t(w[c]);
        total[c] += x[c];
      }
    }
    memcpy(sums + first, sum, sizeof sum);
    memcpy(code_sums + first, total, sizeof total);
  }
}

#endif

}  // namespace
}  // namespace ttaq
