// packed_linear on at most 8 rows of input (kernels/packed_linear.py), bound by the words it reads.
//
// A block makes 16 outputs of every row, and each of its warps takes a span of k. The 16 rows of the weight are the
// first operand of a tensor core, the rows of x its second, whose 8 columns are there anyway, so 8 rows cost no more.
// Any order of k gives the same product, so a lane decodes what it has loaded, 16 bytes side by side, and takes the x
// that belongs to it. The warps leave their sums in shared memory, where they are added in the order of k: no atomics.
#ifdef TTAQ_ON_CPU
#include "cuda_on_cpu.h"
#else
#include "device.h"
#endif

#include "../ttaq_native.h"
#include "skinny_decode.h"

namespace {

constexpr int ROWS = 8, OUTPUTS = 16, TILE = ROWS * OUTPUTS, MOST_PARTS = 96;

template <int BITS>
constexpr int MOST_WARPS = BITS == 3 ? 12 : 16;  // of a block, which share the registers of a multiprocessor

struct Product {
  const uint8_t* x;
  int64_t stride;  // bytes from row to row
  const uint8_t* words;
  const float* scale;
  const int32_t* zero;
  const float* bias;
  const float* x_scale;  // null for floats, and so x_zero
  const int32_t* x_zero;
  int token;
  void* y;
  int y_dtype;
  int row_bytes;
  int m, n, k;
  int group, groups;  // inputs to a scale, scales to an output
  int span;           // inputs to a warp
};

// Where a lane stands: lane 4 g + t takes outputs g and g + 8, row g of x, and the t-th part of a step.
struct Lane {
  int warp, g, t;
  int64_t outputs[2];  // those beyond the last repeat it, and so rows
  __device__ explicit Lane(const Product& p) : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {
    for (int i = 0; i < 2; ++i) {
      const int64_t output = int64_t(blockIdx.x) * OUTPUTS + g + 8 * i;
      outputs[i] = output < p.n ? output : p.n - 1;
    }
  }
};

__device__ int last_row(const Product& p, int row) { return row < p.m ? row : p.m - 1; }

// Leave the four sums of a lane where those of a part of k are kept, (outputs, rows).
__device__ void leave(const Lane& lane, int part, const uint32_t* sums) {
  uint32_t* at = shared_memory() + part * TILE + lane.g * ROWS + 2 * lane.t;
  at[0] = sums[0], at[1] = sums[1], at[8 * ROWS] = sums[2], at[8 * ROWS + 1] = sums[3];
}

// Sums of (code - zero) * x in float32.
template <bool BF16, int BITS>
struct FloatSum {
  static constexpr int X_BYTES = 2;
  float sum[4] = {0, 0, 0, 0}, y[4] = {0, 0, 0, 0}, scale[2];
  uint32_t origin[2];

  __device__ void begin(const Product& p, const Lane& lane, int group) {
    for (int i = 0; i < 2; ++i) {
      const int64_t at = lane.outputs[i] * p.groups + group;
      scale[i] = p.scale[at];
      origin[i] = origin_of<BF16, BITS>(p.zero[at]);
    }
  }
  __device__ void add(const uint32_t* words, const uint32_t* words_8, const uint32_t* x) {
#pragma unroll
    for (int i = 0; i < Piece<BITS>::CODES / 4; ++i) {
      const uint32_t first = quad<BITS>(words, i), second = quad<BITS>(words_8, i);
      const uint32_t a[4] = {centred<BF16, BITS>(first, 0, origin[0]), centred<BF16, BITS>(second, 0, origin[1]),
                             centred<BF16, BITS>(first, 1, origin[0]), centred<BF16, BITS>(second, 1, origin[1])};
      const uint32_t b[2] = {pair_beside<BITS>(x, i, 0), pair_beside<BITS>(x, i, 1)};
      BF16 ? multiply_bfloat16(sum, a, b) : multiply_float16(sum, a, b);
    }
  }
  __device__ void end(const Product&, const Lane&, int, int) {
    for (int i = 0; i < 4; ++i) y[i] += sum[i] * scale[i / 2], sum[i] = 0;
  }
  __device__ void finish(const Lane& lane) {
    const uint32_t bits[4] = {__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]),
                              __float_as_uint(y[3])};
    leave(lane, lane.warp, bits);
  }
  __device__ static float gather(const Product&, const uint32_t* parts, int64_t, int) {
    float y = 0;
    for (int part = 0; part < int(blockDim.x / 32); ++part) y += __uint_as_float(parts[part * TILE]);
    return y;
  }
};

// Exact sums of (code - zero) * (code_x - zero_x), modulo 2^32.
template <int BITS>
struct CodeSum {
  static constexpr int X_BYTES = 1;
  uint32_t sum[4] = {0, 0, 0, 0}, of_words[2] = {0, 0}, of_x = 0;

  __device__ void begin(const Product&, const Lane&, int) {}
  __device__ void add(const uint32_t* words, const uint32_t* words_8, const uint32_t* x) {
    constexpr uint32_t ones = 0x01010101;
#pragma unroll
    for (int i = 0; i < Piece<BITS>::CODES / 4; i += 2) {
      const uint32_t a[4] = {quad<BITS>(words, i), quad<BITS>(words_8, i), quad<BITS>(words, i + 1),
                             quad<BITS>(words_8, i + 1)};
      const uint32_t b[2] = {bytes_beside<BITS>(x, i), bytes_beside<BITS>(x, i + 1)};
      multiply_bytes(sum, a, b);
      of_words[0] = __dp4a(a[2], ones, __dp4a(a[0], ones, of_words[0]));
      of_words[1] = __dp4a(a[3], ones, __dp4a(a[1], ones, of_words[1]));
      of_x = __dp4a(b[1], ones, __dp4a(b[0], ones, of_x));
    }
  }
  // sum w x - zero_x sum w - zero (sum x - count zero_x)
  __device__ void end(const Product& p, const Lane& lane, int group, int count) {
    for (int step = 1; step < 4; step *= 2) {
      for (int i = 0; i < 2; ++i) of_words[i] += __shfl_xor_sync(~0u, of_words[i], step);
      of_x += __shfl_xor_sync(~0u, of_x, step);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * lane.t + i % 2;
      const uint32_t zero_x = p.x_zero[last_row(p, row) * p.token];
      const uint32_t zero = p.zero[lane.outputs[i / 2] * p.groups + group];
      const uint32_t x = __shfl_sync(~0u, of_x, 4 * row);
      sum[i] -= zero_x * of_words[i / 2] + zero * (x - count * zero_x);
    }
    leave(lane, p.groups > 1 ? group : lane.warp, sum);
    for (int i = 0; i < 4; ++i) sum[i] = 0;
    of_words[0] = of_words[1] = of_x = 0;
  }
  __device__ void finish(const Lane&) {}
  __device__ static float gather(const Product& p, const uint32_t* parts, int64_t output, int row) {
    const float x_scale = p.x_scale[row * p.token];
    const float* scale = p.scale + output * p.groups;
    if (p.groups == 1) {
      uint32_t sum = 0;
      for (int part = 0; part < int(blockDim.x / 32); ++part) sum += parts[part * TILE];
      return float(int32_t(sum)) * (x_scale * scale[0]);
    }
    float y = 0;
    for (int group = 0; group < p.groups; ++group)
      y += float(int32_t(parts[group * TILE])) * (x_scale * scale[group]);
    return y;
  }
};

__device__ void store(const Product& p, int64_t at, float y) {
  if (p.y_dtype == TTAQ_FLOAT32)
    static_cast<float*>(p.y)[at] = y;
  else
    static_cast<uint16_t*>(p.y)[at] = p.y_dtype == TTAQ_FLOAT16 ? float16_bits(y) : bfloat16_bits(y);
}

template <class Sum, int BITS, bool WIDE>
__global__ void __launch_bounds__(32 * MOST_WARPS<BITS>, 1) skinny_linear(const Product p) {
  using P = Piece<BITS>;
  const Lane lane(p);
  const int start = lane.warp * p.span, end = start + p.span < p.k ? start + p.span : p.k;
  const int bytes = end == p.k ? p.row_bytes : end * BITS / 8;
  const uint8_t* rows[2] = {p.words + lane.outputs[0] * p.row_bytes, p.words + lane.outputs[1] * p.row_bytes};
  const uint8_t* x_row = p.x + last_row(p, lane.g) * p.stride;
  const uint64_t policy = evict_first();

  constexpr bool AHEAD = BITS != 3;  // three times 16 bytes a row are enough on their way, and all there is room for
  uint32_t words[2][P::LOADED * P::DWORDS], next[2][P::LOADED * P::DWORDS], x[P::CODES * Sum::X_BYTES / 4];
  const auto load = [&](int k) {
    for (int i = 0; i < 2; ++i) load_words<BITS, WIDE>(rows[i], k, lane.t, bytes, next[i], policy);
  };
  if (AHEAD) load(start);
  int group = start / p.group, left = p.group;
  Sum sum;
  sum.begin(p, lane, group);
  for (int k = start; k < end; k += P::TURN) {
    if (!AHEAD) load(k);
#pragma unroll
    for (int i = 0; i < P::LOADED * P::DWORDS; ++i) words[0][i] = next[0][i], words[1][i] = next[1][i];
    if (AHEAD) load(k + P::TURN);
#pragma unroll
    for (int piece = 0; piece < P::LOADED; ++piece) {
      load_x<Sum::X_BYTES, P::CODES>(x_row, k + piece_first<BITS, WIDE>(lane.t, piece), end, x);
      sum.add(words[0] + piece * P::DWORDS, words[1] + piece * P::DWORDS, x);
      if (WIDE && piece < P::LOADED - 1) continue;  // the lanes stand in different steps
      left -= WIDE ? P::TURN : P::STEP;
      if (left == 0 && p.groups > 1) {  // a group is whole steps, a span whole groups
        sum.end(p, lane, group, p.group);
        left = p.group;
        if (++group < p.groups) sum.begin(p, lane, group);
      }
    }
  }
  if (p.groups == 1) sum.end(p, lane, 0, end - start);
  sum.finish(lane);
  __syncthreads();
  for (int i = threadIdx.x; i < OUTPUTS * p.m; i += blockDim.x) {
    const int row = i / OUTPUTS;
    const int64_t output = int64_t(blockIdx.x) * OUTPUTS + i % OUTPUTS;
    if (output >= p.n) continue;
    const float y = Sum::gather(p, shared_memory() + i % OUTPUTS * ROWS + row, output, row);
    store(p, row * int64_t(p.n) + output, p.bias ? y + p.bias[output] : y);
  }
}

// Cut k among the warps of a block, by shape alone: whole groups, and whole turns of the loop where these hold groups.
template <class Sum, int BITS, bool WIDE>
int run(Product p, int64_t group, void* stream) {
  const int turn = Piece<BITS>::TURN, step = WIDE ? turn : Piece<BITS>::STEP;
  if (group % step) return TTAQ_BAD_GROUP;
  const int unit = group && turn % group ? int(group) : turn, units = (p.k + unit - 1) / unit;
  const int most = p.n > 2048 ? 8 : MOST_WARPS<BITS>, each = (units + most - 1) / most;
  const int warps = (units + each - 1) / each;
  p.span = each * unit;
  const bool by_group = Sum::X_BYTES == 1 && p.groups > 1;
  const int parts = by_group ? p.groups : warps, blocks = (p.n + OUTPUTS - 1) / OUTPUTS;
  if (parts > MOST_PARTS) return TTAQ_BAD_GROUP;
  return launch<Product>(skinny_linear<Sum, BITS, WIDE>, blocks, 32 * warps, parts * TILE * 4, stream, p);
}

template <int BITS, bool WIDE>
int run_on(const Product& p, int64_t group, int x_dtype, void* stream) {
  if (p.x_scale) return run<CodeSum<BITS>, BITS, WIDE>(p, group, stream);
  if (x_dtype == TTAQ_FLOAT16) return run<FloatSum<false, BITS>, BITS, WIDE>(p, group, stream);
  return run<FloatSum<true, BITS>, BITS, WIDE>(p, group, stream);
}

// 16 bytes a lane where rows and groups allow it, else as many as its part of a step has.
template <int BITS>
int run_wide(const Product& p, int64_t group, int x_dtype, void* stream) {
  constexpr int turn = Piece<BITS>::TURN, bytes = BITS == 3 ? 4 : 4 * Piece<BITS>::DWORDS;
  const uintptr_t begin = p.row_bytes | uintptr_t(p.words);
  if (begin % bytes) return TTAQ_BAD_ROWS;
  if constexpr (BITS < 8)  // whose pieces are 16 bytes
    if (group % turn || begin % 16) return run_on<BITS, false>(p, group, x_dtype, stream);
  return run_on<BITS, true>(p, group, x_dtype, stream);
}

}  // namespace

int ttaq_cuda_skinny_linear(const void* x, int64_t stride, const uint8_t* words, const float* scale,
                            const int32_t* zero, const float* bias, const float* x_scale, const int32_t* x_zero,
                            int token, void* y, int x_dtype, int y_dtype, int bits, int64_t group, int64_t m, int64_t n,
                            int64_t k, void* stream) {
  if (!x_scale && x_dtype != TTAQ_FLOAT16 && x_dtype != TTAQ_BFLOAT16) return TTAQ_BAD_DTYPE;
  if (y_dtype < TTAQ_FLOAT32 || y_dtype > TTAQ_FLOAT16) return TTAQ_BAD_DTYPE;
  const int64_t step = x_scale ? 1 : 2;  // bytes of an x
  if (m < 1 || m > ROWS || n < 1 || n >= 1 << 27 || k < 1 || k >= 1 << 27) return TTAQ_BAD_ROWS;
  if (uintptr_t(x) % 16 || (m > 1 && stride * step % 16)) return TTAQ_BAD_ROWS;
  if (group && k % group) return TTAQ_BAD_GROUP;
  if (group == k) group = 0;
  const Product p = {static_cast<const uint8_t*>(x), stride * step, words, scale, zero, bias, x_scale, x_zero, token, y,
                     y_dtype, int((k * bits + 7) / 8), int(m), int(n), int(k), int(group ? group : k),
                     int(group ? k / group : 1), 0};
  if (bits == 2) return run_wide<2>(p, group, x_dtype, stream);
  if (bits == 3) return run_wide<3>(p, group, x_dtype, stream);
  if (bits == 4) return run_wide<4>(p, group, x_dtype, stream);
  return bits == 8 ? run_wide<8>(p, group, x_dtype, stream) : TTAQ_BAD_BITS;
}
