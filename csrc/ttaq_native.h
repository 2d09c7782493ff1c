// Every function that the native libraries of ttaq export. Plain C, no torch headers.
//
// Tensors arrive as pointers to dense memory in physical order. Scales and zeros follow the canonical form
// (outer, channels, inner): element (p, c, i) lies at (p * channels + c) * inner + i and uses scale[c], zero[c].
// Every function returns one of the codes below (the CUDA ones: or a cudaError_t above zero).
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define TTAQ_EXPORT __attribute__((visibility("default")))
#else
#define TTAQ_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum ttaq_error {
  TTAQ_OK = 0,
  TTAQ_BAD_DTYPE = -1,   // dtype is none of enum ttaq_dtype
  TTAQ_BAD_LEVEL = -2,   // this processor or this build does not have the level
  TTAQ_BAD_BITS = -3,    // bits is none of 2, 3, 4, 8
  TTAQ_NO_MEMORY = -4,   // scratch memory could not be had
  TTAQ_BAD_KIND = -5,    // kind is none of enum ttaq_kind
  TTAQ_BAD_ROOTS = -6,   // roots is neither 1 nor 2, or qmax not in 1 .. 63
  TTAQ_BAD_GROUP = -7,   // the words of a group of inputs do not fill whole dwords, or whole steps on a GPU
  TTAQ_BAD_ROWS = -8,    // there are more rows than the kernel takes, or they begin where it cannot load
};

enum ttaq_dtype { TTAQ_FLOAT32 = 0, TTAQ_BFLOAT16 = 1, TTAQ_FLOAT16 = 2 };

// How an element is perturbed before it is quantised (kernels/perturb.py).
enum ttaq_kind { TTAQ_DROP = 0, TTAQ_STEP = 1, TTAQ_GAUSS = 2 };

// Instruction sets of the CPU library. BASE is x86-64 as of 2003, or whatever another architecture was compiled for.
enum ttaq_level { TTAQ_BASE = 0, TTAQ_V3 = 1, TTAQ_V4 = 2 };

// ---- CPU ----------------------------------------------------------------------------------------------------------

// The highest level that this processor runs and this library holds.
TTAQ_EXPORT int ttaq_cpu_level(void);

// The level whose products of codes run at that one: V4 wants AVX-512 VNNI as well, and without it they are those of V3.
TTAQ_EXPORT int ttaq_cpu_product_level(void);

// 1 when torch's own thread pool was found in the process, 0 when every call runs on one thread.
TTAQ_EXPORT int ttaq_cpu_has_pool(void);

// y = (clamp(round(x / scale) + round(zero), qmin, qmax) - round(zero)) * scale, in float32, halves to even.
//   x, y: outer * channels * inner elements of dtype. scale: float32. zero: int32 if zero_is_int, else float32.
TTAQ_EXPORT int ttaq_cpu_fake_quant(const void* x, void* y, const float* scale, const void* zero, int zero_is_int,
                                    int dtype, int qmin, int qmax, int64_t outer, int64_t channels, int64_t inner,
                                    int threads, int level);

// The gradients of the above. dx: elements of dtype. dscale, dzero: float32, channels elements each, overwritten;
// the same bits for any number of threads.
TTAQ_EXPORT int ttaq_cpu_fake_quant_backward(const void* grad, const void* x, void* dx, const float* scale,
                                             const void* zero, int zero_is_int, float* dscale, float* dzero, int dtype,
                                             int qmin, int qmax, int64_t outer, int64_t channels, int64_t inner,
                                             int threads, int level);

// Fake quantisation under a random perturbation, with one scale and one zero. `spread` follows the canonical form; the
// random number of an element depends on *seed and on its position alone.
TTAQ_EXPORT int ttaq_cpu_perturbed_fake_quant(const void* x, void* y, const float* scale, const void* zero,
                                              int zero_is_int, const float* spread, const int64_t* seed, int kind,
                                              int dtype, int qmin, int qmax, int64_t outer, int64_t channels,
                                              int64_t inner, int threads, int level);

// The gradients of the above, drawing the same numbers anew. dscale, dzero: one float32 each, overwritten; the same bits
// for any number of threads.
TTAQ_EXPORT int ttaq_cpu_perturbed_fake_quant_backward(const void* grad, const void* x, void* dx, const float* scale,
                                                       const void* zero, int zero_is_int, const float* spread,
                                                       const int64_t* seed, float* dscale, float* dzero, int kind,
                                                       int dtype, int qmin, int qmax, int64_t outer, int64_t channels,
                                                       int64_t inner, int threads, int level);

// Learned rounding (kernels/soft_round.py) of at least one element, all of it float32 but a `zero` of int32.
//   y: like w, overwritten. penalty: one element, overwritten, and so energy: conv_groups * inputs sums of squares of y;
//   with conv_groups 0 there is none. Else memory holds `outputs` lines, those of one group together, and the element at
//   position p of a line belongs to the input p / stride % inputs.
// The same bits for any number of threads.
TTAQ_EXPORT int ttaq_cpu_soft_round(const float* w, const float* v, const float* scale, const void* zero,
                                    int zero_is_int, const float* beta, float* y, float* penalty, float* energy,
                                    int qmin, int qmax, int64_t outer, int64_t channels, int64_t inner,
                                    int64_t outputs, int64_t conv_groups, int64_t inputs, int64_t stride, int threads,
                                    int level);

// The gradient of the above by v. grad: like w. dpenalty: one element. denergy: like energy. dv: like v, overwritten.
TTAQ_EXPORT int ttaq_cpu_soft_round_backward(const float* grad, const float* dpenalty, const float* denergy,
                                             const float* w, const float* v, const float* scale, const void* zero,
                                             int zero_is_int, const float* beta, float* dv, int qmin, int qmax,
                                             int64_t outer, int64_t channels, int64_t inner, int64_t outputs,
                                             int64_t conv_groups, int64_t inputs, int64_t stride, int threads,
                                             int level);

// codes = clamp(round(x / scale) + round(zero), qmin, qmax) as uint8; a NaN gets the code of 0.0.
//   nonfinite: int32, one element, overwritten with the number of NaN and infinite x.
TTAQ_EXPORT int ttaq_cpu_quantize_codes(const void* x, uint8_t* codes, const float* scale, const void* zero,
                                        int zero_is_int, int32_t* nonfinite, int dtype, int qmin, int qmax,
                                        int64_t outer, int64_t channels, int64_t inner, int threads, int level);

// Fake quantisation on a logarithmic grid (kernels/log2.py) with one scale; n elements, roots 1 or 2, qmax 1 to 63.
TTAQ_EXPORT int ttaq_cpu_log2_fake_quant(const void* x, void* y, const float* scale, int dtype, int qmax, int roots,
                                         int64_t n, int threads, int level);

// Its codes; a NaN gets the code of 0.0. nonfinite: as above.
TTAQ_EXPORT int ttaq_cpu_log2_codes(const void* x, uint8_t* codes, const float* scale, int32_t* nonfinite, int dtype,
                                    int qmax, int roots, int64_t n, int threads, int level);

// Its gradients. dscale: one float32, overwritten; the same bits for any number of threads.
TTAQ_EXPORT int ttaq_cpu_log2_fake_quant_backward(const void* grad, const void* x, void* dx, const float* scale,
                                                  float* dscale, int dtype, int qmax, int roots, int64_t n,
                                                  int threads, int level);

// y = fake_quant(x * gain + shift) with one scale and one zero; gain and shift follow the canonical form.
//   seen: null, or float32, (5, channels), overwritten: sum, sum of squares, least, greatest (which pass over NaN) and
//   number outside the codes, of the aligned values.
TTAQ_EXPORT int ttaq_cpu_aligned_fake_quant(const void* x, void* y, const float* gain, const float* shift,
                                            const float* scale, const void* zero, int zero_is_int, float* seen,
                                            int dtype, int qmin, int qmax, int64_t outer, int64_t channels,
                                            int64_t inner, int threads, int level);

// The gradients of the above. dgain, dshift: float32, channels elements each; dscale, dzero: one each; overwritten; the
// same bits for any number of threads.
TTAQ_EXPORT int ttaq_cpu_aligned_fake_quant_backward(const void* grad, const void* x, void* dx, const float* gain,
                                                     const float* shift, const float* scale, const void* zero,
                                                     int zero_is_int, float* dgain, float* dshift, float* dscale,
                                                     float* dzero, int dtype, int qmin, int qmax, int64_t outer,
                                                     int64_t channels, int64_t inner, int threads, int level);

// The codes, 0 .. 2^bits - 1, of `rows` rows of k elements that begin `stride` apart, on a grid for each row.
//   measure: scale and zero receive the grid of each row, as kernels/activation_codes.py says. Else they hold one value,
//   or, where token is 1, one a row. codes: (rows, k), or packed as below. sums: (rows,), of the codes of each row, or
//   null. nonfinite: one element, overwritten with the number of NaN and infinite x.
TTAQ_EXPORT int ttaq_cpu_activation_codes(const void* x, int64_t stride, uint8_t* codes, float* scale, int32_t* zero,
                                          int32_t* sums, int32_t* nonfinite, int measure, int token, int packed,
                                          int dtype, int bits, int64_t rows, int64_t k, int threads, int level);

// codes: (rows, k) uint8, one code a byte. words: (rows, ceil(k * bits / 8)) uint8; code j of a row occupies its bits
// j * bits .. j * bits + bits - 1, lowest bit first; the rest of a row's last byte is zero.
TTAQ_EXPORT int ttaq_cpu_pack_codes(const uint8_t* codes, uint8_t* words, int64_t rows, int64_t k, int bits,
                                    int threads, int level);
TTAQ_EXPORT int ttaq_cpu_unpack_codes(const uint8_t* words, uint8_t* codes, int64_t rows, int64_t k, int bits,
                                      int threads, int level);

// What follows the values of a product before they are written, by the law of kernels/_epilogue.py: each is null, or
// least and most infinite, where nothing is asked. residual lies as y does, and is of the dtype of the call.
typedef struct {
  const float *gain, *shift;  // by output
  const void* residual;
  float least, most;     // bounds: 0 and infinity for a ReLU
  const float* y_scale;  // y becomes uint8 codes, 0 .. 2^y_bits - 1, of this one scale and zero
  const int32_t* y_zero;
  int y_bits;
  int32_t* nonfinite;  // one element, overwritten with the number of NaN and infinite values behind codes
} ttaq_ending;

// y = (sum over k of (x - x_zero) (code - zero)) * (x_scale * scale) + bias, with an exact sum modulo 2^32.
//   x: m rows of k uint8 codes that begin `stride` apart. words: (n, ceil(k * bits / 8)). scale, zero, bias: n each, bias
//   may be null; with `group` inputs a scale, (n, k / group) scales and zeros. x_scale, x_zero: one value, or where token
//   is 1, one a row. y: (m, n) of dtype, overwritten. group * bits (4 for 3 bits) must be a multiple of 32. ending: null,
//   or what follows.
TTAQ_EXPORT int ttaq_cpu_packed_linear(const uint8_t* x, int64_t stride, const uint8_t* words, const float* scale,
                                       const int32_t* zero, const float* bias, const float* x_scale,
                                       const int32_t* x_zero, int token, void* y, int dtype, int bits, int64_t group,
                                       int64_t m, int64_t n, int64_t k, const ttaq_ending* ending, int threads,
                                       int level);

// The convolution of x by the same law; padding stands for 0.0.
//   x: (B, C, H, W) codes, y: (B, O, OH, OW) of dtype, both in that order of memory or, with channels_last, channels
//   innermost. words: (O, ceil(R * S * C / groups * bits / 8)), channels innermost. x_scale, x_zero: one value.
//   geometry: B, C, H, W, O, OH, OW, R, S, and down and across: stride, padding, dilation; groups.
TTAQ_EXPORT int ttaq_cpu_packed_conv2d(const uint8_t* x, const uint8_t* words, const float* scale, const int32_t* zero,
                                       const float* bias, const float* x_scale, const int32_t* x_zero, void* y,
                                       int dtype, int bits, int channels_last, const int64_t* geometry,
                                       const ttaq_ending* ending, int threads, int level);

// y = x @ ((code - zero) * scale).T + bias, for rows of x that begin `stride` apart. words: (n, ceil(k * bits / 8)), as
// above; scale, zero: (n,), or with a `group` that divides k (n, k / group). bias: (n,) or null. y: (m, n), overwritten.
//   No more of the weight than a tile a thread is float at any time; the same bits for any number of threads.
TTAQ_EXPORT int ttaq_cpu_packed_linear_floats(const void* x, int64_t stride, const uint8_t* words, const float* scale,
                                              const int32_t* zero, const float* bias, void* y, int bits, int64_t group,
                                              int64_t m, int64_t n, int64_t k, int x_dtype, int y_dtype, int threads,
                                              int level);

// dx = grad @ ((code - zero) * scale), for rows of grad that begin `stride` apart. dx: (m, k), overwritten.
TTAQ_EXPORT int ttaq_cpu_packed_linear_backward(const void* grad, int64_t stride, const uint8_t* words,
                                                const float* scale, const int32_t* zero, void* dx, int bits,
                                                int64_t group, int64_t m, int64_t n, int64_t k, int dtype, int threads,
                                                int level);

// Convolutions on floats, and the gradients of their input, in float32. x: (B, C, H, W), and grad: (B, O, OH, OW), with
// channels innermost in memory. y: (B, O, OH, OW), and dx: (B, C, H, W), in that order or with channels innermost;
// overwritten. words, bias, geometry: as for ttaq_cpu_packed_conv2d.
TTAQ_EXPORT int ttaq_cpu_packed_conv2d_floats(const float* x, const uint8_t* words, const float* scale,
                                              const int32_t* zero, const float* bias, float* y, int bits,
                                              int channels_last, const int64_t* geometry, int threads, int level);
TTAQ_EXPORT int ttaq_cpu_packed_conv2d_backward(const float* grad, const uint8_t* words, const float* scale,
                                                const int32_t* zero, float* dx, int bits, int channels_last,
                                                const int64_t* geometry, int threads, int level);

// ---- CUDA ---------------------------------------------------------------------------------------------------------

// 0 when a device can be used, else the cudaError_t of asking for one (35 without a driver).
TTAQ_EXPORT int ttaq_cuda_status(void);

// As their CPU namesakes, on device pointers, queued on `stream` (a cudaStream_t) of the current device.
TTAQ_EXPORT int ttaq_cuda_pack_codes(const uint8_t* codes, uint8_t* words, int64_t rows, int64_t k, int bits,
                                     void* stream);
TTAQ_EXPORT int ttaq_cuda_unpack_codes(const uint8_t* words, uint8_t* codes, int64_t rows, int64_t k, int bits,
                                       void* stream);

// packed_linear of 1 to 8 rows, with nothing after it: as ttaq_cpu_packed_linear where x_scale is given and x is codes,
// else as ttaq_cpu_packed_linear_floats on bfloat16 or float16. The same bits at every call; no workspace.
//   x: rows of k elements in room for a multiple of 16 bytes, zeros behind them, that begin `stride` elements and a
//   multiple of 16 bytes apart. words: rows of a multiple of 4 bytes, 8 for 4 bits, 16 for 8 bits, and so their address;
//   loads are 16 bytes wide where that is 16 and `group` fills them. group: 0, or a multiple of 64, 128 for 3 bits that
//   divides k; of codes at most 96 groups.
TTAQ_EXPORT int ttaq_cuda_skinny_linear(const void* x, int64_t stride, const uint8_t* words, const float* scale,
                                        const int32_t* zero, const float* bias, const float* x_scale,
                                        const int32_t* x_zero, int token, void* y, int x_dtype, int y_dtype, int bits,
                                        int64_t group, int64_t m, int64_t n, int64_t k, void* stream);

#ifdef __cplusplus
}
#endif
