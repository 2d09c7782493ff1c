// The inner loops of learned rounding, compiled once for each instruction set as kernels.cpp is.
#include "arithmetic.h"
#include "kernels.h"
#include "number.h"

namespace ttaq {
namespace {

// The polynomials of the three functions are those of the Cephes library (Moshier, expf, exp2f, log2f).

// a * b + c, rounded once where there is an instruction for it: what these functions give becomes no code.
inline float fused(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline float power_of_two(float exponent) { return float_of(uint32_t(int32_t(exponent) + 127) << 23); }

// e^value within 2 ulp for |value| <= 87, and what it is there beyond.
inline float exponential(float value) {
  value = clamp(value, {-87.0f, 87.0f});
  const float power = nearest(value * 1.44269504f);
  const float x = fused(power, 2.12194440e-4f, fused(power, -0.693359375f, value));  // ln 2 in two parts
  float sum = 1.9875691500e-4f;
  sum = fused(sum, x, 1.3981999507e-3f);
  sum = fused(sum, x, 8.3334519073e-3f);
  sum = fused(sum, x, 4.1665795894e-2f);
  sum = fused(sum, x, 1.6666665459e-1f);
  sum = fused(sum, x, 5.0000001201e-1f);
  return (fused(sum, x * x, x) + 1.0f) * power_of_two(power);
}

// The logarithm to base 2 of a normal positive number, within 3 ulp.
inline float logarithm(float value) {
  constexpr uint32_t root = 0x3f3504f3u;  // sqrt(1/2)
  const uint32_t bits = bits_of(value) - root;
  const float x = float_of((bits & 0x007fffffu) + root) - 1.0f;
  float sum = 7.0376836292e-2f;
  sum = fused(sum, x, -1.1514610310e-1f);
  sum = fused(sum, x, 1.1676998740e-1f);
  sum = fused(sum, x, -1.2420140846e-1f);
  sum = fused(sum, x, 1.4249322787e-1f);
  sum = fused(sum, x, -1.6668057665e-1f);
  sum = fused(sum, x, 2.0000714765e-1f);
  sum = fused(sum, x, -2.4999993993e-1f);
  sum = fused(sum, x, 3.3333331174e-1f);
  const float square = x * x, y = fused(x * square, sum, -0.5f * square);  // ln(1 + x) - x
  return (fused(y, 0.44269504f, x * 0.44269504f) + y + x) + float(int32_t(bits) >> 23);
}

// base^exponent for a base of 0 to 1.2: 0 stays 0 and a NaN a NaN, and nothing is below 2^-126. The relative error is
// within 2 ulp and half an ulp of the exponent of the result, which a small result multiplies and so makes up for.
inline float raise(float base, float exponent) {
  const float value = clamp(exponent * logarithm(base), {-126.0f, 126.0f}), power = nearest(value);
  const float x = value - power;
  float sum = 1.535336188319500e-4f;
  sum = fused(sum, x, 1.339887440266574e-3f);
  sum = fused(sum, x, 9.618437357674640e-3f);
  sum = fused(sum, x, 5.550332471162809e-2f);
  sum = fused(sum, x, 2.402264791363012e-1f);
  sum = fused(sum, x, 6.931472028550421e-1f);
  const float result = fused(sum, x, 1.0f) * power_of_two(power);
  return base > 0.0f ? result : base;
}

inline float below(float value) {  // floor
  const float rounded = nearest(value);
  return rounded > value ? rounded - 1.0f : rounded;
}

constexpr float STRETCH = 1.2f, SHIFT = -0.1f;

inline float sigmoid(float value) { return 1.0f / (1.0f + exponential(-value)); }

template <bool ENERGY>
void backward(const float* grad, float dpenalty, const float* denergy, const SoftWeights& weights, float* dv) {
  const float *w = weights.w, *v = weights.v, *scale = weights.scale, *zero = weights.zero;
  const float beta = weights.beta;
  const Range range = weights.range;
#pragma omp simd
  for (int64_t i = 0; i < weights.size; ++i) {
    const float s = sigmoid(v[i]), h = s * STRETCH + SHIFT;
    const float code = below(w[i] / scale[i]) + h + zero[i];
    float upstream = grad[i];
    if (ENERGY) upstream += 2.0f * ((clamp(code, range) - zero[i]) * scale[i]) * denergy[i];
    const float centred = 2.0f * h - 1.0f, slope = 2.0f * beta * raise(fabsf(centred), beta - 1.0f);
    const float pull = dpenalty * (centred < 0.0f ? slope : -slope);
    const float dh = ((code >= range.low) & (code <= range.high) ? upstream * scale[i] : 0.0f) + pull;
    dv[i] = (h > 0.0f) & (h < 1.0f) ? dh * s * (1.0f - s) * STRETCH : 0.0f;
  }
}

}  // namespace

void TTAQ_LEVEL::soft_round(const SoftWeights& weights, float* y_, double* penalty, float* energy) {
  const float beta = weights.beta;
  const Range range = weights.range;
  for (int64_t start = 0; start < weights.size; start += TERMS * LANES) {
    const float *w = weights.w + start, *v = weights.v + start;
    const float *scale = weights.scale + start, *zero = weights.zero + start;
    float* y = y_ + start;
    const int64_t size = weights.size - start < TERMS * LANES ? weights.size - start : TERMS * LANES;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
      const float h = clamp(sigmoid(v[i]) * STRETCH + SHIFT, {0.0f, 1.0f});
      y[i] = (clamp(below(w[i] / scale[i]) + h + zero[i], range) - zero[i]) * scale[i];
      sum += 1.0f - raise(fabsf(2.0f * h - 1.0f), beta);
    }
    *penalty += sum;
  }
  if (!energy) return;
#pragma omp simd
  for (int64_t i = 0; i < weights.size; ++i) energy[i] += y_[i] * y_[i];
}

void TTAQ_LEVEL::soft_round_backward(const float* grad, float dpenalty, const float* denergy,
                                     const SoftWeights& weights, float* dv) {
  (denergy ? backward<true> : backward<false>)(grad, dpenalty, denergy, weights, dv);
}

}  // namespace ttaq
