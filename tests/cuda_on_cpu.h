// Runs a kernel of csrc/cuda on the CPU: each CUDA thread is a fiber, and the fibers of a block take turns from meeting
// to meeting. It stands for csrc/cuda/device.h and for what CUDA C++ builds in, as far as these kernels use it.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace {

struct Index {
  unsigned x;
};
Index threadIdx, blockIdx, blockDim;

// ---- Fibers -------------------------------------------------------------------------------------------------------

struct Meeting {  // of the threads of a warp or a block
  int expected = 0, arrived = 0, turn = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  bool done = false;
};

struct Warp {
  Meeting meeting;
  uint32_t said[32][8];  // what each lane brings to a meeting
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Meeting whole_block;
std::vector<uint32_t> room;
void (*body)();

void wait(Meeting& meeting) {
  const int turn = meeting.turn;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0, ++meeting.turn;
    return;
  }
  while (meeting.turn == turn) {
    const Index self = threadIdx;
    swapcontext(&fibers[self.x].context, &scheduler);
    threadIdx = self;
  }
}

void enter() {
  const unsigned self = threadIdx.x;
  body();
  fibers[self].done = true;
  swapcontext(&fibers[self].context, &scheduler);
}

void run_block(int threads, int shared) {
  fibers.clear(), fibers.resize(threads);
  warps.assign(threads / 32, Warp());
  for (Warp& warp : warps) warp.meeting.expected = 32;
  whole_block = {threads, 0, 0};
  room.assign(shared / 4, 0xa5a5a5a5);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = 1 << 16;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads; left > 0;) {
    for (int thread = 0; thread < threads; ++thread) {
      if (fibers[thread].done) continue;
      threadIdx.x = thread;
      swapcontext(&scheduler, &fibers[thread].context);
      left -= fibers[thread].done;
    }
  }
}

// ---- What CUDA C++ builds in --------------------------------------------------------------------------------------

inline void __syncthreads() { wait(whole_block); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}

// Bring words to a meeting of the warp, and return what all its lanes bring; it stands until `__syncwarp`.
inline Warp& say(const uint32_t* words, int count) {
  Warp& warp = warps[threadIdx.x / 32];
  memcpy(warp.said[threadIdx.x % 32], words, 4 * count);
  wait(warp.meeting);
  return warp;
}
inline void __syncwarp() { wait(warps[threadIdx.x / 32].meeting); }

inline uint32_t __shfl_sync(uint32_t, uint32_t value, int lane) {
  const uint32_t heard = say(&value, 1).said[lane % 32][0];
  __syncwarp();
  return heard;
}
inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t value, int step) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ step);
}

// ---- The functions of device.h ------------------------------------------------------------------------------------

inline uint64_t evict_first() { return 0; }

template <int DWORDS>
void load_once(const uint8_t* from, uint32_t* to, uint64_t) {
  if (uintptr_t(from) % (4 * DWORDS)) __builtin_trap();  // as the hardware would
  memcpy(to, from, 4 * DWORDS);
}

inline float value_of(bool bfloat16, uint16_t bits) {
  if (bfloat16) return __uint_as_float(uint32_t(bits) << 16);
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}
inline uint16_t float16_bits(float value) {
  const _Float16 half = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t subtract_float16(uint32_t a, uint32_t b) {
  const uint32_t low = float16_bits(value_of(false, a) - value_of(false, b));
  return low | uint32_t(float16_bits(value_of(false, a >> 16) - value_of(false, b >> 16))) << 16;
}
inline uint32_t subtract_bfloat16(uint32_t a, uint32_t b) {
  const uint32_t low = bfloat16_bits(value_of(true, a) - value_of(true, b));
  return low | uint32_t(bfloat16_bits(value_of(true, a >> 16) - value_of(true, b >> 16))) << 16;
}

// mma.sync: PER_WORD values a word; PTX ISA, "Matrix fragments for mma.m16n8k16" (16 bits) and "m16n8k32" (bytes).
template <int PER_WORD, class Number, class Value>
void multiply(Number* sum, const uint32_t* a, const uint32_t* b, Value value) {
  uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Warp& warp = say(words, 6);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, bits = 32 / PER_WORD;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 8 * PER_WORD; ++k) {  // k lies in word `far`, lane `at` of four, at `place`
      const int far = k / (4 * PER_WORD), at = k / PER_WORD % 4, place = k % PER_WORD * bits;
      const uint32_t left = warp.said[row % 8 * 4 + at][far * 2 + row / 8], right = warp.said[column * 4 + at][4 + far];
      sum[i] += value(left >> place) * value(right >> place);
    }
  }
  __syncwarp();
}
inline void multiply_float16(float* sum, const uint32_t* a, const uint32_t* b) {
  multiply<2>(sum, a, b, [](uint32_t bits) { return value_of(false, uint16_t(bits)); });
}
inline void multiply_bfloat16(float* sum, const uint32_t* a, const uint32_t* b) {
  multiply<2>(sum, a, b, [](uint32_t bits) { return value_of(true, uint16_t(bits)); });
}
inline void multiply_bytes(uint32_t* sum, const uint32_t* a, const uint32_t* b) {
  multiply<4>(sum, a, b, [](uint32_t bits) { return bits & 255; });
}

inline uint32_t* shared_memory() { return room.data(); }

template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared, void*, Arguments arguments) {
  static std::function<void()> run;
  run = [=] { kernel(arguments); };
  body = [] { run(); };
  blockDim.x = threads;
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = unsigned(block);
    run_block(threads, shared);
  }
  return 0;
}

}  // namespace
