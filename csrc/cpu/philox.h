// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) for several counters at once.
#pragma once

#include <stdint.h>

namespace ttaq {

constexpr int CALLS = 32;  // counters a call of philox() takes

// words[w][i] becomes word w of the counter (first + i, 0, 0) under the key `seed`; first is a multiple of CALLS.
// `static`: each instruction set compiles its own copy.
static inline void philox(uint64_t seed, uint64_t first, uint32_t words[4][CALLS]) {
#pragma omp simd
  for (int i = 0; i < CALLS; ++i) {
    uint32_t c0 = uint32_t(first) + uint32_t(i), c1 = uint32_t(first >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
      c0 = uint32_t(b >> 32) ^ c1 ^ k0;
      c2 = uint32_t(a >> 32) ^ c3 ^ k1;
      c1 = uint32_t(b);
      c3 = uint32_t(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0][i] = c0;
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
}

}  // namespace ttaq
