// How a lane of skinny_linear.cu walks packed words, decodes them, and finds the x beside each code.
//
// A piece is 16 codes side by side, 32 of 3 bits. It is decoded four codes at a time, one a byte, as masks and shifts
// give them: quad i holds the codes c, c + D, c + 2 D and c + 3 D, where D codes fill a byte (8 codes three bytes).
#pragma once

namespace {

template <int BITS>
struct Piece {
  static constexpr int CODES = BITS == 3 ? 32 : 16, DWORDS = CODES * BITS / 32;
  static constexpr int LOADED = BITS == 8 ? 1 : BITS == 4 ? 2 : 4;  // by a lane in a turn: 16 bytes, 48 of 3 bits
  static constexpr int STEP = 4 * CODES, TURN = LOADED * STEP;      // codes of the four lanes that share a row
  static constexpr int D = BITS == 3 ? 8 : 8 / BITS;
  __device__ static constexpr int first(int quad) { return quad / D * 4 * D + quad % D; }
};

// The first code of a piece among those of a turn, of which lane t of four takes 16 bytes side by side (WIDE), or a
// piece of every step.
template <int BITS, bool WIDE>
__device__ int piece_first(int t, int piece) {
  return (WIDE ? t * Piece<BITS>::LOADED + piece : piece * 4 + t) * Piece<BITS>::CODES;
}

// Load a lane's words of a turn that begins at code k; from byte `bytes` of the row on they are 0.
template <int BITS, bool WIDE>
__device__ void load_words(const uint8_t* row, int k, int t, int bytes, uint32_t* to, uint64_t policy) {
  constexpr int DWORDS = Piece<BITS>::DWORDS, TOGETHER = WIDE ? 4 : BITS == 3 ? 1 : DWORDS;
#pragma unroll
  for (int i = 0; i < Piece<BITS>::LOADED * DWORDS; i += TOGETHER) {
    const int at = (k + piece_first<BITS, WIDE>(t, i / DWORDS)) / 8 * BITS + i % DWORDS * 4;
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j) to[i + j] = 0;
    if (at < bytes) load_once<TOGETHER>(row + at, to + i, policy);
  }
}

// Load the COUNT x of `SIZE` bytes from k on; from `end` on they are 0, in whole 16 bytes.
template <int SIZE, int COUNT>
__device__ void load_x(const uint8_t* row, int k, int end, uint32_t* to) {
#pragma unroll
  for (int i = 0; i < COUNT * SIZE / 16; ++i) {
    uint4 four = make_uint4(0, 0, 0, 0);
    const int at = k + i * 16 / SIZE;
    if (at < end) four = *reinterpret_cast<const uint4*>(row + int64_t(at) * SIZE);
    to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
  }
}

// Quad i of a piece.
template <int BITS>
__device__ uint32_t quad(const uint32_t* words, int i) {
  if constexpr (BITS == 8) return words[i];
  if constexpr (BITS == 4) return words[i / 2] >> (4 * (i % 2)) & 0x0f0f0f0f;
  if constexpr (BITS == 2) return words[0] >> (2 * i) & 0x03030303;
  // Eight codes are three bytes: the first byte of each of the four, the second, the third.
  const uint32_t low = __byte_perm(__byte_perm(words[0], words[1], 0x0630), words[2], 0x5210);
  const uint32_t middle = __byte_perm(__byte_perm(words[0], words[1], 0x0741), words[2], 0x6210);
  const uint32_t high = __byte_perm(__byte_perm(words[0], words[1], 0x0052), words[2], 0x7410);
  if (i == 2) return (low >> 6 & 0x03030303) | (middle & 0x01010101) << 2;
  if (i == 5) return (middle >> 7 & 0x01010101) | (high & 0x03030303) << 1;
  return (i < 2 ? low >> (3 * i) : i < 5 ? middle >> (3 * i - 8) : high >> (3 * i - 16)) & 0x07070707;
}

// The bytes of x, one a code, that belong to quad i.
template <int BITS>
__device__ uint32_t bytes_beside(const uint32_t* x, int i) {
  constexpr int D = Piece<BITS>::D;
  if constexpr (D == 1) return x[i];
  const int first = Piece<BITS>::first(i);
  uint32_t two[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int a = first + 2 * j * D, b = a + D;
    two[j] = __byte_perm(x[a / 4], x[b / 4], a % 4 | (4 + b % 4) << 4);
  }
  return __byte_perm(two[0], two[1], 0x5410);
}

// The x of 16 bits that belong to the first or last two codes of quad i.
template <int BITS>
__device__ uint32_t pair_beside(const uint32_t* x, int i, int last) {
  constexpr int D = Piece<BITS>::D;
  const int a = Piece<BITS>::first(i) + 2 * last * D, b = a + D;
  if constexpr (D == 1) return x[a / 2];
  return __byte_perm(x[a / 2], x[b / 2], a % 2 ? 0x7632 : 0x5410);  // D is even
}

// What `centred` subtracts. A byte below the exponent of 2^10 in float16 makes 1024 + code, below that of 2^7 in
// bfloat16 128 + code, for codes under 128; of 8 bits there is 2^23 + code in float32.
template <bool BF16, int BITS>
__device__ uint32_t origin_of(int32_t zero) {
  if constexpr (BF16 && BITS == 8) return __float_as_uint(8388608.0f + float(zero));
  const uint32_t bits = BF16 ? bfloat16_bits(128.0f + float(zero)) : float16_bits(1024.0f + float(zero));
  return bits | bits << 16;
}

// code - zero, exact, of the first or last two codes of a quad, in float16 or bfloat16.
template <bool BF16, int BITS>
__device__ uint32_t centred(uint32_t quad, int last, uint32_t origin) {
  if constexpr (BF16 && BITS == 8) {
    const int byte = 2 * last;
    const float a = __uint_as_float(__byte_perm(quad, 0x4b000000, 0x7440 + byte)) - __uint_as_float(origin);
    const float b = __uint_as_float(__byte_perm(quad, 0x4b000000, 0x7441 + byte)) - __uint_as_float(origin);
    return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);  // the lower halves are 0
  } else {
    const uint32_t pair = __byte_perm(quad, BF16 ? 0x43434343 : 0x64646464, last ? 0x4342 : 0x4140);
    return BF16 ? subtract_bfloat16(pair, origin) : subtract_float16(pair, origin);
  }
}

}  // namespace
