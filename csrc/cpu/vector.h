// Vectors of float32 as wide as the registers of the instruction set that a *kernels.cpp is compiled for.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "arithmetic.h"

namespace ttaq {
namespace {

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Lanes __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* from) {
  Vector value;
  memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vector value) { memcpy(to, &value, sizeof value); }

inline Vector same(float value) { return value - Vector{}; }

// a * b + c, rounded once where there is an instruction for it. The build contracts nothing by itself.
inline Vector fused(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Lanes numbered() {  // 0, 1, 2, ..
  Lanes value;
  for (int i = 0; i < int(LANES); ++i) value[i] = uint32_t(i);
  return value;
}

// The same, in a register: else g++ reads it from memory again for each use, which waits where it is in no cache yet.
inline Lanes in_register(Lanes value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}

inline float sum(Vector value) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)value), _mm512_extractf32x8_ps((__m512)value, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
#else
  const Vector quarter = value;
#endif
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

typedef float Four __attribute__((vector_size(16)));

// The sums of four vectors.
inline Four sums_of_four(const Vector* values) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)values[0], b = (__m512)values[1], c = (__m512)values[2], d = (__m512)values[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return (Four)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps((__m256)values[0], (__m256)values[1]);
  const __m256 cd = _mm256_hadd_ps((__m256)values[2], (__m256)values[3]);
  const __m256 all = _mm256_hadd_ps(ab, cd);
  return (Four)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
  return Four{sum(values[0]), sum(values[1]), sum(values[2]), sum(values[3])};
#endif
}

}  // namespace
}  // namespace ttaq
