// A vector of sums, one for each of some outputs, and what it takes to add products of four codes to each; for the
// instruction set that includes it.
#pragma once

#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "product.h"

namespace ttaq {
namespace {

#if defined(__AVX512VNNI__)

constexpr int TALLEST = 8, WIDEST = 3, PER_PANEL = 1;
using Vector = __m512i;

inline Vector nothing() { return _mm512_setzero_si512(); }
inline Vector load(const uint32_t* at) { return _mm512_loadu_si512(at); }
inline void store(int32_t* at, Vector value) { _mm512_storeu_si512(at, value); }
inline Vector everywhere(int32_t dword) { return _mm512_set1_epi32(dword); }
inline Vector both(Vector a, Vector b) { return _mm512_and_si512(a, b); }
template <int BITS>
inline Vector shifted(Vector value) {
  return BITS ? _mm512_srli_epi32(value, BITS) : value;
}
template <int PLANES>
inline Vector add_products(Vector sums, Vector x, Vector w) {
  return _mm512_dpbusd_epi32(sums, x, w);
}

#elif defined(__AVX2__)

constexpr int TALLEST = 4, WIDEST = 1, PER_PANEL = 2;
using Vector = __m256i;

inline Vector nothing() { return _mm256_setzero_si256(); }
inline Vector load(const uint32_t* at) { return _mm256_loadu_si256((const Vector*)at); }
inline void store(int32_t* at, Vector value) { _mm256_storeu_si256((Vector*)at, value); }
inline Vector everywhere(int32_t dword) { return _mm256_set1_epi32(dword); }
inline Vector both(Vector a, Vector b) { return _mm256_and_si256(a, b); }
template <int BITS>
inline Vector shifted(Vector value) {
  return BITS ? _mm256_srli_epi32(value, BITS) : value;
}
template <int PLANES>
inline Vector add_products(Vector sums, Vector x, Vector w) {
  if (PLANES > 1) {  // codes of 4 bits: two products of 255 * 15 fit 16 bits
    const Vector pairs = _mm256_maddubs_epi16(x, w);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  const Vector even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)),
                                        _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  const Vector odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
  return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}

#else

constexpr int TALLEST = 4, WIDEST = 1, PER_PANEL = 1;
struct Vector {
  int32_t lane[PANEL_OUTPUTS];
};

inline Vector nothing() { return {}; }
inline Vector load(const uint32_t* at) {
  Vector value;
  memcpy(&value, at, sizeof value);
  return value;
}
inline void store(int32_t* at, Vector value) { memcpy(at, &value, sizeof value); }
inline Vector everywhere(int32_t dword) {
  Vector value;
  for (int32_t& lane : value.lane) lane = dword;
  return value;
}
inline Vector both(Vector a, Vector b) {
  for (int i = 0; i < PANEL_OUTPUTS; ++i) a.lane[i] &= b.lane[i];
  return a;
}
template <int BITS>
inline Vector shifted(Vector value) {
  for (int32_t& lane : value.lane) lane = int32_t(uint32_t(lane) >> BITS);
  return value;
}
template <int PLANES>
inline Vector add_products(Vector sums, Vector x, Vector w) {
  for (int i = 0; i < PANEL_OUTPUTS; ++i)
    for (int byte = 0; byte < 32; byte += 8)
      sums.lane[i] += ((x.lane[i] >> byte) & 255) * int32_t(int8_t(w.lane[i] >> byte));
  return sums;
}

#endif

constexpr int STEP = PANEL_OUTPUTS / PER_PANEL, ROW = MOST_PANELS * PANEL_OUTPUTS;

template <int PLANES>
inline Vector mask() {
  return everywhere(PLANES == 4 ? 0x03030303 : PLANES == 2 ? 0x0f0f0f0f : -1);
}

// The codes of one plane of some words.
template <int PLANES, int PLANE>
inline Vector plane(Vector words) {
  return PLANES == 1 ? words : both(shifted<PLANE * 8 / PLANES>(words), mask<PLANES>());
}

inline int32_t dword_at(const uint8_t* at) {
  int32_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

}  // namespace
}  // namespace ttaq
