// From packed words to vectors of float32.
#pragma once

#include "float_kernels.h"
#include "vector.h"

namespace ttaq {
namespace {

constexpr int64_t REACH = 16;  // bytes that a decoder reads at a time, at most

// Whether an instruction looks the values of all codes up in one register, by the lowest bits of each lane.
#if defined(__AVX512F__)
template <int BITS>
constexpr bool LOOKS_UP = BITS <= 4;
inline Vector look_up(Lanes index, Vector table) {
  return (Vector)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
}
#elif defined(__AVX2__)
template <int BITS>
constexpr bool LOOKS_UP = BITS <= 3;
inline Vector look_up(Lanes index, Vector table) {
  return (Vector)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
}
#else
template <int BITS>
constexpr bool LOOKS_UP = false;
inline Vector look_up(Lanes, Vector table) { return table; }
#endif

// The values of codes: (code - zero) * scale.
template <int BITS>
struct Values {
  Vector table, zero, scale;

  Values(float scale_, float zero_) : zero(same(zero_)), scale(same(scale_)) {
    const Lanes codes = numbered() & ((1u << BITS) - 1);
    table = (__builtin_convertvector((Integers)codes, Vector) - zero) * scale;
  }

  // Of the codes in the lowest bits of the lanes, whatever is above them.
  Vector of(Lanes lanes) const {
    if (LOOKS_UP<BITS>) return look_up(lanes, table);
    return (__builtin_convertvector((Integers)(lanes & ((1u << BITS) - 1)), Vector) - zero) * scale;
  }
};

// Brings each of LANES codes, which begin `offset` bits after a byte, to the lowest bits of its lane.
template <int BITS>
struct Spreader {
  Lanes byte, shift;

  explicit Spreader(int64_t offset) {
    const Lanes bit = numbered() * uint32_t(BITS) + uint32_t(offset);
    byte = bit >> 3;
    shift = bit & 7u;
#if defined(__AVX2__)
    byte = byte | ((byte + 1) << 8) | 0x80800000u;
#endif
  }

  Lanes operator()(const uint8_t* words) const {
#if defined(__AVX512BW__)
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)words));
    return (Lanes)_mm512_shuffle_epi8(all, (__m512i)byte) >> shift;
#elif defined(__AVX2__)
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)words));
    return (Lanes)_mm256_shuffle_epi8(all, (__m256i)byte) >> shift;
#else
    Lanes lanes;
    for (int i = 0; i < int(LANES); ++i) lanes[i] = uint32_t(words[byte[i]] | words[byte[i] + 1] << 8) >> shift[i];
    return lanes;
#endif
  }
};

template <>
struct Spreader<8> {
  explicit Spreader(int64_t) {}

  Lanes operator()(const uint8_t* words) const {
#if defined(__AVX512F__)
    return (Lanes)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)words));
#elif defined(__AVX2__)
    return (Lanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)words));
#else
    Lanes lanes;
    for (int i = 0; i < int(LANES); ++i) lanes[i] = words[i];
    return lanes;
#endif
  }
};

// Writes the values of `count` codes, of which the first begins `bit` bits after `row` and is brought down by `first`,
// and of what follows them up to a whole vector, to `out`.
template <int BITS>
inline void dequantise_run(const uint8_t* row, const uint8_t* end, int64_t bit, const Spreader<BITS>& first,
                           const Values<BITS>& values, int64_t count, float* out) {
  constexpr bool WHOLE_BYTES = LANES * BITS % 8 == 0;  // in a vector: then all begin at the same bit of a byte
  const uint8_t* words = row + bit / 8;
  int64_t i = 0;
  for (; WHOLE_BYTES && i < count && end - words >= REACH; i += LANES, words += LANES * BITS / 8)
    store(out + i, values.of(first(words)));
  for (; i < count; i += LANES) {
    const int64_t at = bit + i * BITS, left = end - (row + at / 8);
    uint8_t rest[REACH] = {};
    memcpy(rest, row + at / 8, size_t(left < REACH ? left : REACH));
    store(out + i, values.of(Spreader<BITS>(at % 8)(rest)));
  }
}

template <int BITS>
void dequantise(const Weights& weights, int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile,
                int64_t stride) {
  const int64_t last = column + columns;
  Spreader<BITS> spread(column * BITS % 8);  // rows begin with a byte
  for (int64_t n = row; n < row + rows; ++n, tile += stride) {
    const int64_t parameters = n * weights.groups;
    for (int64_t at = column, group = column / weights.group; at < last; ++group) {
      const int64_t next = (group + 1) * weights.group, stop = next < last ? next : last;
      const Values<BITS> values(weights.scale[parameters + group], float(weights.zero[parameters + group]));
      if (weights.groups > 1) spread = Spreader<BITS>(at * BITS % 8);
      dequantise_run(weights.row(n), weights.end, at * BITS, spread, values, stop - at, tile + at - column);
      at = stop;
    }
    for (int64_t i = columns; i % PADDING; ++i) tile[i] = 0.0f;
  }
}

}  // namespace
}  // namespace ttaq
