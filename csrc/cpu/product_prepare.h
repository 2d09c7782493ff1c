// Laying out codes and words for the inner loops of products.
#pragma once

#include "product_vector.h"

namespace ttaq {
namespace {

// Lays out n codes by planes, `stream` bytes apart.
template <int PLANES>
void spread(const uint8_t* codes, int64_t n, uint8_t* planes, int64_t stream) {
  for (int p = 0; p < PLANES; ++p)
    for (int64_t j = 0; j < (n - p + PLANES - 1) / PLANES; ++j) planes[p * stream + j] = codes[j * PLANES + p];
}

#if defined(__AVX512F__)

inline void transpose_square(const uint8_t* const* rows, int64_t at, uint32_t flipped, uint32_t* square) {
  __m512i a[PANEL_OUTPUTS], b[PANEL_OUTPUTS];
  // The next panel's words are asked for: short rows in turn look like no stream to the processor.
  const int64_t ahead = PANEL_OUTPUTS * (intptr_t(rows[1]) - intptr_t(rows[0]));
  for (int i = 0; i < PANEL_OUTPUTS; ++i) _mm_prefetch((const char*)(intptr_t(rows[i]) + at + ahead), _MM_HINT_T0);
  for (int i = 0; i < PANEL_OUTPUTS; ++i)
    a[i] = _mm512_xor_si512(_mm512_loadu_si512(rows[i] + at), _mm512_set1_epi32(int32_t(flipped)));
  for (int i = 0; i < PANEL_OUTPUTS; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < PANEL_OUTPUTS; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < PANEL_OUTPUTS; i += 8)
    for (int j = i; j < i + 4; ++j) {
      b[j] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88);
      b[j + 4] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(square + PANEL_OUTPUTS * i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(square + PANEL_OUTPUTS * (i + 8), _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}

#endif

#if defined(__AVX512VNNI__)

// Spreads the 64 codes of 3 bits in the first 24 bytes to 4 bits.
inline __m256i widened(__m256i words) {
  // Each lane of 128 bits gets the 6 bytes of its 16 codes, each 16 bits of it the two bytes that hold its code.
  const __m512i lanes = _mm512_permutexvar_epi16(
      _mm512_setr_epi32(0x00010000, 2, 0, 0, 0x00040003, 5, 0, 0, 0x00070006, 8, 0, 0, 0x000a0009, 11, 0, 0),
      _mm512_castsi256_si512(words));
  const __m512i even = _mm512_shuffle_epi8(
      lanes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, -1)));
  const __m512i odd = _mm512_shuffle_epi8(
      lanes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 3, 4, 4, 5, 4, 5, 5, -1)));
  const __m512i low = _mm512_and_si512(
      _mm512_srlv_epi16(even, _mm512_broadcast_i32x4(_mm_setr_epi16(0, 6, 4, 2, 0, 6, 4, 2))), _mm512_set1_epi16(7));
  const __m512i high = _mm512_and_si512(
      _mm512_srlv_epi16(odd, _mm512_broadcast_i32x4(_mm_setr_epi16(3, 1, 7, 5, 3, 1, 7, 5))), _mm512_set1_epi16(7));
  return _mm512_cvtepi16_epi8(_mm512_or_si512(low, _mm512_slli_epi16(high, 4)));
}

#endif


// Lays out the codes of a cell: code j of plane p of a dword is code j * PLANES + p. What lies beyond `n` is 0.
template <int PLANES>
inline void lay_out(const uint8_t* codes, int64_t n, uint8_t* cell, int64_t width) {
  int64_t at = 0;
#if defined(__AVX2__)
  const __m128i order = PLANES == 2 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                    : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (; PLANES > 1 && at + 16 <= n; at += 16)
    _mm_storeu_si128((__m128i*)(cell + at), _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(codes + at)), order));
#endif
  if (PLANES == 1) {
    memcpy(cell, codes, size_t(n));
    at = n;
  }
  for (int64_t i = at; i < width; ++i) cell[i] = 0;
  for (; at < n; ++at) cell[at / (4 * PLANES) * 4 * PLANES + at % PLANES * 4 + at % (4 * PLANES) / PLANES] = codes[at];
}

inline int32_t sum_of(const uint8_t* codes, int64_t n) {
  int64_t at = 0;
  int32_t sum = 0;
#if defined(__AVX512VNNI__)
  Vector sums = nothing();
  for (; at + 64 <= n; at += 64)
    sums = add_products<1>(sums, _mm512_loadu_si512(codes + at), everywhere(0x01010101));
  if (at) sum = _mm512_reduce_add_epi32(sums);
#endif
#pragma omp simd reduction(+ : sum)
  for (int64_t i = at; i < n; ++i) sum += codes[i];
  return sum;
}

template <int PLANES>
void arrange(const uint8_t* codes, int64_t stride, int64_t count, int64_t channels, uint8_t* cells, int64_t width,
             int32_t* sums) {
  if (channels == 3 && width == 4) {  // the colours of an image
    for (int64_t i = 0; i < count; ++i, codes += stride) {
      const uint8_t cell[4] = {codes[0], codes[1], codes[2], 0};
      memcpy(cells + 4 * i, cell, 4);
      if (sums) sums[i] = codes[0] + codes[1] + codes[2];
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    lay_out<PLANES>(codes + i * stride, channels, cells + i * width, width);
    if (sums) sums[i] = sum_of(codes + i * stride, channels);
  }
}

// Turns sixteen rows of sixteen bytes into columns.
void interleave(const uint8_t* rows, int64_t stride, uint8_t* columns, int64_t column_stride) {
#if defined(__SSE2__)
  __m128i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128((const __m128i*)(rows + i * stride));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    memcpy(a, b, sizeof a);
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128((__m128i*)(columns + i * column_stride), a[i]);
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) columns[j * column_stride + i] = rows[i * stride + j];
#endif
}

// Makes a panel of sixteen rows of dwords; `flipped` is xored to each.
void transpose(const uint8_t* const* rows, int64_t dwords, uint32_t flipped, uint32_t* panel) {
  int64_t d = 0;
#if defined(__AVX512F__)
  for (; d + PANEL_OUTPUTS <= dwords; d += PANEL_OUTPUTS) transpose_square(rows, 4 * d, flipped, panel + d * PANEL_OUTPUTS);
#endif
  for (; d < dwords; ++d)
    for (int lane = 0; lane < PANEL_OUTPUTS; ++lane)
      panel[d * PANEL_OUTPUTS + lane] = uint32_t(dword_at(rows[lane] + 4 * d)) ^ flipped;
}

// Spreads n codes of 3 bits to 4; the last byte may hold one code and a zero.
void widen(const uint8_t* words, int64_t n, uint8_t* wide) {
  int64_t at = 0;
#if defined(__AVX512VNNI__)
  for (; at + 64 <= n && at * 3 / 8 + 32 <= n * 3 / 8; at += 64)
    _mm256_storeu_si256((__m256i*)(wide + at / 2), widened(_mm256_loadu_si256((const __m256i*)(words + at * 3 / 8))));
#endif
  for (; at < n; at += 2) {
    const int64_t bit = at * 3;
    const bool more = bit / 8 + 1 < (n * 3 + 7) / 8;
    const uint32_t pair = (words[bit / 8] | (more ? uint32_t(words[bit / 8 + 1]) << 8 : 0)) >> bit % 8;
    wide[at / 2] = uint8_t((pair & 7) | (at + 1 < n ? (pair & 56) << 1 : 0));
  }
}

}  // namespace
}  // namespace ttaq
