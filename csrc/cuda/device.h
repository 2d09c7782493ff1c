// What skinny_linear.cu takes from PTX, a function each; tests/cuda_on_cpu.h has the same functions in plain C++.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace {

// A policy under which a line leaves the L2 cache first: words are read once.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Load 1, 2 or 4 dwords from an address that is a multiple of as many, past the L1 cache.
template <int DWORDS>
__device__ __forceinline__ void load_once(const uint8_t* from, uint32_t* to, uint64_t policy) {
  static_assert(DWORDS == 1 || DWORDS == 2 || DWORDS == 4);
  if constexpr (DWORDS == 4)
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from), "l"(policy));
  else if constexpr (DWORDS == 2)
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                 : "=r"(to[0]), "=r"(to[1])
                 : "l"(from), "l"(policy));
  else
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;"
                 : "=r"(to[0])
                 : "l"(from), "l"(policy));
}

// The bits of a float rounded to float16 or bfloat16, halves to even.
__device__ __forceinline__ uint16_t float16_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint16_t bfloat16_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// a - b in both halves of a word.
__device__ __forceinline__ uint32_t subtract_float16(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}
__device__ __forceinline__ uint32_t subtract_bfloat16(uint32_t a, uint32_t b) {
  uint32_t difference;  // b * -1 + a: sm_80 has no subtraction of bfloat16
  asm("fma.rn.bf16x2 %0, %2, %3, %1;" : "=r"(difference) : "r"(a), "r"(b), "r"(0xbf80bf80u));
  return difference;
}

// sum += a b: a 16 x 16 by rows, b 16 x 8, sum 16 x 8. Lane 4 g + t holds, two values a word, columns 2 t, 2 t + 1 of
// rows g and g + 8 of a (then those 8 further on), rows 2 t, 2 t + 1 of column g of b (then those 8 further on), and
// columns 2 t, 2 t + 1 of rows g and g + 8 of the sum.
__device__ __forceinline__ void multiply_float16(float* sum, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_bfloat16(float* sum, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for bytes without sign, modulo 2^32: a 16 x 32, b 32 x 8, four values a word and 16 in the place of 8.
__device__ __forceinline__ void multiply_bytes(uint32_t* sum, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The shared memory that the launch asked for.
__device__ __forceinline__ uint32_t* shared_memory() {
  extern __shared__ uint32_t room[];
  return room;
}

template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared, void* stream, Arguments arguments) {
  kernel<<<dim3(unsigned(blocks)), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments);
  return int(cudaGetLastError());
}

}  // namespace
