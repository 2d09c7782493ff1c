// Products of floats with packed weights: the inner loops, compiled once for each instruction set as kernels.cpp is.
#include "float_kernels.h"

#include "decode.h"
#include "kernels.h"
#include "number.h"
#include "vector.h"

namespace ttaq {
namespace {

#if defined(__AVX512F__)
constexpr int TALL = 6, WIDE = 4;  // rows and vectors of columns whose sums `multiply` keeps in registers
constexpr int DOT_ROWS = 6;        // rows whose products with TOGETHER lines `dots` keeps there
#else
constexpr int TALL = 6, WIDE = 2;
constexpr int DOT_ROWS = 2;
#endif

constexpr int CHAINS = 4;        // sums that `row_sums` keeps, since one would wait for itself
constexpr int64_t AHEAD = 4096;  // bytes of words that it asks for early: hardware looks ahead within a page alone

template <int ROWS>
void multiply_rows(const float* const* x, int64_t start, int64_t depth, const float* tile, float* sums) {
  const float* row[ROWS];
  for (int i = 0; i < ROWS; ++i) row[i] = x[i] + start;
  for (int64_t column = 0; column < PANEL; column += WIDE * LANES) {
    const float* line = tile + column;
    Vector sum[ROWS][WIDE] = {};
    for (int64_t k = 0; k < depth; ++k, line += PANEL) {
      Vector w[WIDE];
#pragma GCC unroll 16
      for (int j = 0; j < WIDE; ++j) w[j] = load(line + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Vector value = same(row[i][k]);
#pragma GCC unroll 16
        for (int j = 0; j < WIDE; ++j) sum[i][j] = fused(value, w[j], sum[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < WIDE; ++j) {
        float* to = sums + i * PANEL + column + j * LANES;
        store(to, load(to) + sum[i][j]);
      }
  }
}

void multiply(const float* const* x, int64_t m, int64_t start, int64_t depth, const float* tile, float* sums) {
  constexpr void (*OF_ROWS[])(const float* const*, int64_t, int64_t, const float*, float*) = {
      nullptr,          multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
      multiply_rows<4>, multiply_rows<5>, multiply_rows<6>,
  };
  static_assert(TALL == 6, "a function for each number of rows");
  for (int64_t i = 0; i < m; i += TALL)
    OF_ROWS[m - i < TALL ? m - i : TALL](x + i, start, depth, tile, sums + i * PANEL);
}

template <int ROWS>
void dots_of_rows(const float* const* x, const Runs& runs, const float* tile, int64_t stride, float* sums,
                  int64_t sums_stride) {
  static_assert(TOGETHER == 4, "as many sums as are made together");
  Vector sum[ROWS][TOGETHER] = {};
  for (int64_t run = 0; run < runs.count; ++run, tile += runs.depth) {
    const float* row[ROWS];
    for (int i = 0; i < ROWS; ++i) row[i] = x[i] + runs.offsets[run];
    for (int64_t k = 0; k < runs.depth; k += LANES) {
      Vector w[TOGETHER];
#pragma GCC unroll 16
      for (int j = 0; j < TOGETHER; ++j) w[j] = load(tile + j * stride + k);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Vector value = load(row[i] + k);
#pragma GCC unroll 16
        for (int j = 0; j < TOGETHER; ++j) sum[i][j] = fused(value, w[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    Four all;
    memcpy(&all, sums + i * sums_stride, sizeof all);
    all += sums_of_four(sum[i]);
    memcpy(sums + i * sums_stride, &all, sizeof all);
  }
}

void dots(const float* const* x, int64_t m, const Runs& runs, const float* tile, int64_t stride, int64_t n,
          float* sums, int64_t sums_stride) {
  constexpr void (*OF_ROWS[])(const float* const*, const Runs&, const float*, int64_t, float*, int64_t) = {
      nullptr,
      dots_of_rows<1>,
      dots_of_rows<2>,
#if defined(__AVX512F__)
      dots_of_rows<3>,
      dots_of_rows<4>,
      dots_of_rows<5>,
      dots_of_rows<6>,
#endif
  };
  static_assert(sizeof OF_ROWS == (DOT_ROWS + 1) * sizeof OF_ROWS[0], "a function for each number of rows");
  for (int64_t i = 0; i < m; i += DOT_ROWS) {
    const auto of_rows = OF_ROWS[m - i < DOT_ROWS ? m - i : DOT_ROWS];
    for (int64_t j = 0; j < n; j += TOGETHER)
      of_rows(x + i, runs, tile + j * stride, stride, sums + i * sums_stride + j, sums_stride);
  }
}

void weigh(const float* const* values, const float* const* weights, int64_t taps, int64_t n, float* sums) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    Vector sum = load(sums + i);
    for (int64_t tap = 0; tap < taps; ++tap) sum = fused(load(values[tap] + i), load(weights[tap] + i), sum);
    store(sums + i, sum);
  }
  for (; i < n; ++i)
    for (int64_t tap = 0; tap < taps; ++tap) sums[i] += values[tap][i] * weights[tap][i];
}

// A lane holds HELD codes that follow one another, and a block fills the lanes. All widths share this order, and so the
// order of their sums: a layer on packed codes agrees with its twin on one code a byte.
constexpr int HELD = 8;
constexpr int64_t BLOCK = HELD * LANES;
static_assert(BLOCK <= LONGEST_BLOCK, "the buffer of `spread` has room");

int64_t spread(const float* x, int64_t k, float* out) {
  int64_t block = 0;
  for (; block < k; block += BLOCK)
    for (int64_t i = 0; i < HELD; ++i)
      for (int64_t lane = 0; lane < LANES; ++lane) {
        const int64_t at = block + lane * HELD + i;
        out[block + i * LANES + lane] = at < k ? x[at] : 0.0f;
      }
  return block;
}

// The codes of a block: the i-th of each lane in its lowest bits.
template <int BITS>
struct CodesOfBlock {
  Lanes lanes;

  explicit CodesOfBlock(const uint8_t* words) {
    memcpy(&lanes, words, sizeof lanes);
    lanes = in_register(lanes);
  }
  Lanes at(int i) const { return lanes >> (i * BITS); }
};

template <>
CodesOfBlock<2>::CodesOfBlock(const uint8_t* words) {
#if defined(__AVX512F__)
  lanes = in_register((Lanes)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)words)));
#else
  typedef uint16_t Pairs __attribute__((vector_size(2 * LANES)));  // of bytes
  Pairs pairs;
  memcpy(&pairs, words, sizeof pairs);
  lanes = in_register(__builtin_convertvector(pairs, Lanes));
#endif
}

template <>
CodesOfBlock<3>::CodesOfBlock(const uint8_t* words) {
#if defined(__AVX512BW__)
  const __m512i three = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);  // of each four lanes
  const __m512i split = _mm512_broadcast_i32x4(_mm_setr_epi32(0x80020100, 0x80050403, 0x80080706, 0x800b0a09));
  const __m512i all = _mm512_maskz_loadu_epi32(0xfff, words);
  lanes = (Lanes)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(three, all), split);
#else
  for (int i = 0; i < int(LANES); ++i)
    lanes[i] = uint32_t(words[3 * i] | words[3 * i + 1] << 8 | words[3 * i + 2] << 16);
#endif
}

template <>
struct CodesOfBlock<8> {
  Lanes low, high;

  explicit CodesOfBlock(const uint8_t* words) {
    typedef uint64_t Quads __attribute__((vector_size(8 * LANES)));
    Quads quads;
    memcpy(&quads, words, sizeof quads);
    low = __builtin_convertvector(quads, Lanes);
    high = __builtin_convertvector(quads >> 32, Lanes);
  }
  Lanes at(int i) const { return (i < 4 ? low : high) >> (i % 4 * 8); }
};

template <int BITS>
inline void add_block(const uint8_t* words, const Values<BITS>& values, const float* x, Vector* sums) {
  const CodesOfBlock<BITS> codes(words);
#pragma GCC unroll 16
  for (int i = 0; i < HELD; ++i)
    sums[i % CHAINS] = fused(values.of(codes.at(i)), load(x + i * LANES), sums[i % CHAINS]);
}

template <int BITS>
void row_sums(const Weights& weights, int64_t row, int64_t rows, const float* x, int64_t k, float* sums) {
  constexpr int64_t BYTES = BLOCK * BITS / 8;
  const int64_t whole = k / BLOCK;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* words = weights.row(row + r);
    const Values<BITS> values(1.0f, float(weights.zero[row + r]));
    Vector part[CHAINS] = {};
    for (int64_t block = 0; block < whole; ++block, words += BYTES) {
      __builtin_prefetch(words + AHEAD);
      add_block<BITS>(words, values, x + block * BLOCK, part);
    }
    if (whole * BLOCK < k) {
      uint8_t last[BYTES] = {};
      memcpy(last, words, size_t(weights.row_bytes - whole * BYTES));
      add_block<BITS>(last, values, x + whole * BLOCK, part);
    }
    sums[r] = sum((part[0] + part[1]) + (part[2] + part[3]));
  }
}

template <class T>
void widen_all(const void* from, int64_t n, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = widen(((const T*)from)[i]);
}

template <class T>
void narrow_all(const float* from, int64_t n, void* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(from[i], ((T*)to)[i]);
}

}  // namespace

#define FOR_EACH_WIDTH(loop) {nullptr, nullptr, loop<2>, loop<3>, loop<4>, nullptr, nullptr, nullptr, loop<8>}
#define FOR_EACH_DTYPE(loop) {loop<float>, loop<bfloat16>, loop<float16>}

const FloatKernels TTAQ_LEVEL::float_kernels = {
    FOR_EACH_WIDTH(dequantise), multiply, dots, weigh, spread, FOR_EACH_WIDTH(row_sums), FOR_EACH_DTYPE(widen_all),
    FOR_EACH_DTYPE(narrow_all),
};

}  // namespace ttaq
