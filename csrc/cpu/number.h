// float32 <-> bfloat16 and float16 by integer arithmetic: every compiler vectorises it, and it is exact.
#pragma once

#include <stdint.h>
#include <string.h>

namespace ttaq {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// `static`: each instruction set compiles its own copy, so that the linker cannot pick one for all.
static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float widen(float value) { return value; }

static inline float widen(bfloat16 value) { return float_of(uint32_t(value.bits) << 16); }

static inline float widen(float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t rebiased = bits_of(float_of(magnitude) * 0x1p112f);  // subnormals become normal, exactly
  return float_of(sign | rebiased | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u));
}

// All roundings are to nearest, halves to even; a NaN stays a (quiet) NaN.
static inline void narrow(float value, float& out) { out = value; }

static inline void narrow(float value, bfloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline void narrow(float value, float16& out) {
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  // All three candidates, then a choice by masks: with branches this does not vectorise everywhere.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // an ulp of 0.5 is 2^-24
  const uint32_t is_small = -uint32_t(magnitude < 0x38800000u), is_large = -uint32_t(magnitude >= 0x477ff000u);
  const uint32_t large = 0x7c00u | (uint32_t(magnitude > 0x7f800000u) << 9);  // infinity from 65520 on, or a NaN
  const uint32_t half = (subnormal & is_small) | (large & is_large) | (normal & ~(is_small | is_large));
  out.bits = uint16_t(sign | half);
}

}  // namespace ttaq
