// The inner loops of products of codes, compiled once for each instruction set as kernels.cpp is.
#include <string.h>

#include <cstddef>

#include "number.h"
#include "product.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ttaq {
namespace {

// ---- A vector of sums, one for each of some outputs, and what it takes to add products of four codes to each --------

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
  int32_t lane[LANES];
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
  for (int i = 0; i < LANES; ++i) a.lane[i] &= b.lane[i];
  return a;
}
template <int BITS>
inline Vector shifted(Vector value) {
  for (int32_t& lane : value.lane) lane = int32_t(uint32_t(lane) >> BITS);
  return value;
}
template <int PLANES>
inline Vector add_products(Vector sums, Vector x, Vector w) {
  for (int i = 0; i < LANES; ++i)
    for (int byte = 0; byte < 32; byte += 8)
      sums.lane[i] += ((x.lane[i] >> byte) & 255) * int32_t(int8_t(w.lane[i] >> byte));
  return sums;
}

#endif

constexpr int STEP = LANES / PER_PANEL, ROW = MOST_PANELS * LANES;

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
    for (int64_t at = 0; at < 4 * PLANES * tile.dwords; at += 4 * PLANES, word += LANES) {
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

// Lays out n codes by planes, `stream` bytes apart.
template <int PLANES>
void spread(const uint8_t* codes, int64_t n, uint8_t* planes, int64_t stream) {
  for (int p = 0; p < PLANES; ++p)
    for (int64_t j = 0; j < (n - p + PLANES - 1) / PLANES; ++j) planes[p * stream + j] = codes[j * PLANES + p];
}

#if defined(__AVX512F__)

inline void transpose_square(const uint8_t* const* rows, int64_t at, uint32_t flipped, uint32_t* square) {
  __m512i a[LANES], b[LANES];
  for (int i = 0; i < LANES; ++i)
    a[i] = _mm512_xor_si512(_mm512_loadu_si512(rows[i] + at), _mm512_set1_epi32(int32_t(flipped)));
  for (int i = 0; i < LANES; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < LANES; i += 8)
    for (int j = i; j < i + 4; ++j) {
      b[j] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88);
      b[j + 4] = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(square + LANES * i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(square + LANES * (i + 8), _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
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

// ---- Preparing codes and words ---------------------------------------------------------------------------------------

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
  for (; d + LANES <= dwords; d += LANES) transpose_square(rows, 4 * d, flipped, panel + d * LANES);
#endif
  for (; d < dwords; ++d)
    for (int lane = 0; lane < LANES; ++lane)
      panel[d * LANES + lane] = uint32_t(dword_at(rows[lane] + 4 * d)) ^ flipped;
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

template <class T, bool FIRST, bool LAST>
void finish_rows(const Finish& f) {
  for (int i = 0; i < f.rows; ++i) {
    const uint32_t x_sum = uint32_t(f.x_sum[i]), x_zero = uint32_t(f.x_zero[i]);
    const int32_t* sums = f.sums + i * ROW;
    float* values = f.values + i * ROW;
    T* y = (T*)f.y[i];
#pragma omp simd
    for (int j = 0; j < f.outputs; ++j) {  // modulo 2^32: only the result has to fit
      const uint32_t exact = uint32_t(sums[j]) - uint32_t(f.shift[j]) * x_sum - x_zero * uint32_t(f.weight_sum[j]);
      float value = float(int32_t(exact)) * (f.x_scale[i] * f.scale[j]);
      if (!FIRST) value += values[j];
      if (LAST)
        narrow(f.bias ? value + f.bias[j] : value, y[j]);
      else
        values[j] = value;
    }
  }
}

template <class T>
void finish(const Finish& f) {
  if (f.first)
    (f.last ? finish_rows<T, true, true> : finish_rows<T, true, false>)(f);
  else
    (f.last ? finish_rows<T, false, true> : finish_rows<T, false, false>)(f);
}

// ---- Each channel by itself ------------------------------------------------------------------------------------------

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

template <class T>
void finish_deep(const FinishDeep& f) {
  T* y = (T*)f.y;
  const uint32_t x_zero = uint32_t(f.x_zero);
#pragma omp simd
  for (int64_t c = 0; c < f.channels; ++c) {
    const uint32_t exact =
        uint32_t(f.sums[c]) - uint32_t(f.shift[c]) * uint32_t(f.code_sums[c]) - x_zero * uint32_t(f.weight_sum[c]);
    const float value = float(int32_t(exact)) * (f.x_scale * f.scale[c]);
    narrow(f.bias ? value + f.bias[c] : value, y[c]);
  }
}

// ---- A few rows of activations ---------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)

template <int PLANES, int PLANE>
inline Vector plane_of_bytes(Vector words) {
  return PLANES == 1 ? _mm512_xor_si512(words, everywhere(int32_t(0x80808080))) : plane<PLANES, PLANE>(words);
}

template <int PLANES, int ROWS, int INPUTS>
void dot_rows(const uint8_t* const* words, int64_t bytes, const uint8_t* planes, int64_t input_stride, int32_t* sums,
              int32_t* code_sums) {
  constexpr int CHAINS = INPUTS == 1 ? PLANES : INPUTS == 2 && PLANES > 1 ? 2 : 1;  // sums that do not wait for others
  Vector sum[ROWS][INPUTS][CHAINS], code_sum[ROWS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
    code_sum[i] = nothing();
#pragma GCC unroll 4
    for (int m = 0; m < INPUTS; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c) sum[i][m][c] = nothing();
  }
  const int64_t stream = (bytes + 63) / 64 * 64;
  const Vector ones = everywhere(0x01010101);
  for (int64_t at = 0; at < bytes; at += 64) {
    const __mmask64 inside = bytes - at >= 64 ? ~__mmask64(0) : (__mmask64(1) << (bytes - at)) - 1;
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const Vector word = _mm512_maskz_loadu_epi8(inside, words[i] + at);
      Vector code[PLANES], total;
      code[0] = plane_of_bytes<PLANES, 0>(word);
      total = code[0];
      if constexpr (PLANES > 1) total = _mm512_add_epi8(total, code[1] = plane<PLANES, 1>(word));
      if constexpr (PLANES > 2) total = _mm512_add_epi8(total, code[2] = plane<PLANES, 2>(word));
      if constexpr (PLANES > 2) total = _mm512_add_epi8(total, code[3] = plane<PLANES, 3>(word));
      if (PLANES == 1) total = _mm512_maskz_mov_epi8(inside, total);  // the flipped bytes beyond are not 0
      code_sum[i] = _mm512_dpbusd_epi32(code_sum[i], ones, total);
#pragma GCC unroll 4
      for (int p = 0; p < PLANES; ++p)
#pragma GCC unroll 4
        for (int m = 0; m < INPUTS; ++m) {
          const Vector x = _mm512_loadu_si512(planes + m * input_stride + p * stream + at);
          sum[i][m][p % CHAINS] = _mm512_dpbusd_epi32(sum[i][m][p % CHAINS], x, code[p]);
        }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
    code_sums[i] = _mm512_reduce_add_epi32(code_sum[i]);
#pragma GCC unroll 4
    for (int m = 0; m < INPUTS; ++m) {
      for (int c = 1; c < CHAINS; ++c) sum[i][m][0] = _mm512_add_epi32(sum[i][m][0], sum[i][m][c]);
      sums[i * 4 + m] = _mm512_reduce_add_epi32(sum[i][m][0]);
    }
  }
}

template <int PLANES, int ROWS>
void dot_inputs(const uint8_t* const* words, int64_t bytes, const uint8_t* planes, int inputs, int64_t input_stride,
                int32_t* sums, int32_t* code_sums) {
  constexpr decltype(&dot_rows<PLANES, ROWS, 1>) by_inputs[] = {
      dot_rows<PLANES, ROWS, 1>, dot_rows<PLANES, ROWS, 2>, dot_rows<PLANES, ROWS, 3>, dot_rows<PLANES, ROWS, 4>};
  by_inputs[inputs - 1](words, bytes, planes, input_stride, sums, code_sums);
}

template <int PLANES>
void dot(const uint8_t* const* words, int rows, int64_t bytes, const uint8_t* planes, int inputs, int64_t input_stride,
         int32_t* sums, int32_t* code_sums) {
  if (rows == 4) return dot_inputs<PLANES, 4>(words, bytes, planes, inputs, input_stride, sums, code_sums);
  for (int i = 0; i < rows; ++i)
    dot_inputs<PLANES, 1>(words + i, bytes, planes, inputs, input_stride, sums + 4 * i, code_sums + i);
}

#else

template <int PLANES>
constexpr std::nullptr_t dot = nullptr;

#endif

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
