// The inner loops of products of a few rows of activations with words as they lie.
#pragma once

#include <cstddef>

#include "product_vector.h"

namespace ttaq {
namespace {

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
  // Short rows in turn look like no stream to the processor: ask for those that the next call reads.
  const int64_t ahead = ROWS > 1 ? ROWS * (intptr_t(words[1]) - intptr_t(words[0])) : bytes;
  for (int64_t at = 0; at < bytes; at += 64) {
    const __mmask64 inside = bytes - at >= 64 ? ~__mmask64(0) : (__mmask64(1) << (bytes - at)) - 1;
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      _mm_prefetch((const char*)(intptr_t(words[i]) + at + ahead), _MM_HINT_T0);
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

}  // namespace
}  // namespace ttaq
