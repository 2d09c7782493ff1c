// Packing codes into words and back on a GPU. Source of the order: ttaq_native.h.
#include <cuda_runtime.h>

#include "../ttaq_native.h"

namespace {

constexpr int THREADS = 256;
constexpr int CODES = 32;  // codes a thread handles in the dense kernels: BITS words of 32 bits

int blocks_for(int64_t threads) { return int((threads + THREADS - 1) / THREADS); }

// Sixteen codes, one a byte of `four[0..3]`, into the low 16 * BITS bits of a word.
template <int BITS>
__device__ uint64_t squeeze(uint4 codes) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  const uint32_t four[4] = {codes.x, codes.y, codes.z, codes.w};
  uint64_t stream = 0;
#pragma unroll
  for (int j = 0; j < 16; ++j) stream |= uint64_t((four[j / 4] >> (8 * (j % 4))) & mask) << (BITS * j);
  return stream;
}

template <int BITS>
__device__ uint4 spread(uint64_t stream) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  uint32_t four[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < 16; ++j) four[j / 4] |= (uint32_t(stream >> (BITS * j)) & mask) << (8 * (j % 4));
  return make_uint4(four[0], four[1], four[2], four[3]);
}

// Rows without padding, aligned to 16 bytes: one stream of `chunks` * 32 codes.
template <int BITS>
__global__ void pack_dense(const uint4* __restrict__ codes, uint32_t* __restrict__ words, int64_t chunks) {
  const int64_t chunk = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (chunk >= chunks) return;
  const uint64_t low = squeeze<BITS>(codes[2 * chunk]), high = squeeze<BITS>(codes[2 * chunk + 1]);
  // The 32 * BITS bits are `low` in the first half and `high` in the second, which begins at bit 16 * BITS.
  uint32_t out[BITS];
#pragma unroll
  for (int w = 0; w < BITS; ++w) {
    const int from_low = 32 * w, from_high = 32 * w - 16 * BITS;
    uint32_t bits = 0;
    if (from_low < 16 * BITS) bits |= uint32_t(low >> from_low);
    if (from_high >= 0) bits |= uint32_t(high >> from_high);
    if (from_high < 0 && from_high > -32) bits |= uint32_t(high << -from_high);
    out[w] = bits;
  }
  if constexpr (BITS == 2) {
    reinterpret_cast<uint2*>(words)[chunk] = make_uint2(out[0], out[1]);
  } else if constexpr (BITS == 4) {
    reinterpret_cast<uint4*>(words)[chunk] = make_uint4(out[0], out[1], out[2], out[3]);
  } else {
#pragma unroll
    for (int w = 0; w < BITS; ++w) words[BITS * chunk + w] = out[w];
  }
}

template <int BITS>
__global__ void unpack_dense(const uint32_t* __restrict__ words, uint4* __restrict__ codes, int64_t chunks) {
  const int64_t chunk = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (chunk >= chunks) return;
  uint32_t in[BITS];
  if constexpr (BITS == 2) {
    const uint2 pair = reinterpret_cast<const uint2*>(words)[chunk];
    in[0] = pair.x, in[1] = pair.y;
  } else if constexpr (BITS == 4) {
    const uint4 quad = reinterpret_cast<const uint4*>(words)[chunk];
    in[0] = quad.x, in[1] = quad.y, in[2] = quad.z, in[3] = quad.w;
  } else {
#pragma unroll
    for (int w = 0; w < BITS; ++w) in[w] = words[BITS * chunk + w];
  }
  uint64_t low = 0, high = 0;
#pragma unroll
  for (int w = 0; w < BITS; ++w) {
    const int to_low = 32 * w, to_high = 32 * w - 16 * BITS;
    if (to_low < 16 * BITS) low |= uint64_t(in[w]) << to_low;
    if (to_high >= 0) high |= uint64_t(in[w]) << to_high;
    if (to_high < 0 && to_high > -32) high |= uint64_t(in[w] >> -to_high);
  }
  codes[2 * chunk] = spread<BITS>(low);
  codes[2 * chunk + 1] = spread<BITS>(high);
}

// Any row length and any address, from byte (or code) `first` of the whole on: a thread a byte (or a code).
template <int BITS>
__global__ void pack_rows(const uint8_t* __restrict__ codes, uint8_t* __restrict__ words, int64_t first, int64_t total,
                          int64_t k, int64_t bytes) {
  const int64_t index = first + int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= total) return;
  const int64_t row = index / bytes, bit = index % bytes * 8;
  const int64_t last = min(k - 1, (bit + 7) / BITS);
  uint32_t word = 0;
  for (int64_t j = bit / BITS; j <= last; ++j) {
    const uint32_t code = codes[row * k + j] & ((1u << BITS) - 1);
    const int shift = int(j * BITS - bit);
    word |= shift < 0 ? code >> -shift : code << shift;
  }
  words[index] = uint8_t(word);
}

template <int BITS>
__global__ void unpack_rows(const uint8_t* __restrict__ words, uint8_t* __restrict__ codes, int64_t first,
                            int64_t total, int64_t k, int64_t bytes) {
  const int64_t index = first + int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= total) return;
  const int64_t row = index / k, bit = index % k * BITS;
  uint32_t pair = words[row * bytes + bit / 8];
  if (bit % 8 + BITS > 8) pair |= uint32_t(words[row * bytes + bit / 8 + 1]) << 8;
  codes[index] = uint8_t((pair >> (bit % 8)) & ((1u << BITS) - 1));
}

bool aligned(const void* a, const void* b) { return ((uintptr_t(a) | uintptr_t(b)) & 15) == 0; }

// How many chunks of 32 codes the dense kernel takes; the rest is for the other one.
int64_t dense_chunks(const void* codes, const void* words, int64_t rows, int64_t k, int bits) {
  return k * bits % 8 == 0 && aligned(codes, words) ? rows * k / CODES : 0;
}

template <int BITS>
int pack(const uint8_t* codes, uint8_t* words, int64_t rows, int64_t k, cudaStream_t stream) {
  const int64_t chunks = dense_chunks(codes, words, rows, k, BITS), bytes = (k * BITS + 7) / 8;
  const int64_t first = chunks * CODES * BITS / 8, total = rows * bytes;
  if (chunks)
    pack_dense<BITS><<<blocks_for(chunks), THREADS, 0, stream>>>(reinterpret_cast<const uint4*>(codes),
                                                               reinterpret_cast<uint32_t*>(words), chunks);
  if (first < total)
    pack_rows<BITS><<<blocks_for(total - first), THREADS, 0, stream>>>(codes, words, first, total, k, bytes);
  return int(cudaGetLastError());
}

template <int BITS>
int unpack(const uint8_t* words, uint8_t* codes, int64_t rows, int64_t k, cudaStream_t stream) {
  const int64_t chunks = dense_chunks(codes, words, rows, k, BITS), bytes = (k * BITS + 7) / 8;
  const int64_t first = chunks * CODES, total = rows * k;
  if (chunks)
    unpack_dense<BITS><<<blocks_for(chunks), THREADS, 0, stream>>>(reinterpret_cast<const uint32_t*>(words),
                                                                 reinterpret_cast<uint4*>(codes), chunks);
  if (first < total)
    unpack_rows<BITS><<<blocks_for(total - first), THREADS, 0, stream>>>(words, codes, first, total, k, bytes);
  return int(cudaGetLastError());
}

int copy(const uint8_t* from, uint8_t* to, int64_t bytes, cudaStream_t stream) {
  return int(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, stream));
}

}  // namespace

int ttaq_cuda_status(void) {
  int devices = 0;
  return int(cudaGetDeviceCount(&devices));
}

int ttaq_cuda_pack_codes(const uint8_t* codes, uint8_t* words, int64_t rows, int64_t k, int bits, void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (bits == 2) return pack<2>(codes, words, rows, k, queue);
  if (bits == 3) return pack<3>(codes, words, rows, k, queue);
  if (bits == 4) return pack<4>(codes, words, rows, k, queue);
  return bits == 8 ? copy(codes, words, rows * k, queue) : TTAQ_BAD_BITS;
}

int ttaq_cuda_unpack_codes(const uint8_t* words, uint8_t* codes, int64_t rows, int64_t k, int bits, void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (bits == 2) return unpack<2>(words, codes, rows, k, queue);
  if (bits == 3) return unpack<3>(words, codes, rows, k, queue);
  if (bits == 4) return unpack<4>(words, codes, rows, k, queue);
  return bits == 8 ? copy(words, codes, rows * k, queue) : TTAQ_BAD_BITS;
}
