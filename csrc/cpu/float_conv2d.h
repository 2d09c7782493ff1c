// What the convolutions of floats share. Channels lie innermost in what they read, and in the rows of the weights.
#pragma once

#include <string.h>

#include "float_product.h"
#include "geometry.h"

namespace ttaq {

// Images of float32 that are written; their pixels are numbered through.
struct Images {
  float* values;
  int64_t channels, pixels;  // of an image
  bool channels_last;

  float* at(int64_t pixel, int64_t channel) const {
    if (channels_last) return values + pixel * channels + channel;
    return values + (pixel / pixels * channels + channel) * pixels + pixel % pixels;
  }

  // Writes sums[i][0 .. n), rows `stride` apart, to pixel pixel[i] and the channels from `channel` on.
  void write(const float* sums, int64_t stride, const int64_t* pixel, int64_t m, int64_t channel, int64_t n) const {
    for (int64_t i = 0; i < m; ++i) {
      float* to = at(pixel[i], channel);
      if (channels_last)
        memcpy(to, sums + i * stride, size_t(n) * sizeof(float));
      else
        for (int64_t j = 0; j < n; ++j) to[j * pixels] = sums[i * stride + j];
    }
  }
};

struct Convolution {
  const FloatKernels* kernels;
  Geometry g;
  Weights weights;
  int bits;
  const float *source, *bias;
  Images target;
  int threads;
};

// The line, or column, of the output that reached `position` of the input through a tap, or -1.
inline int64_t reached(int64_t position, int64_t pad, int64_t back, int64_t stride, int64_t size) {
  const int64_t at = position + pad - back;
  if (stride == 1) return at >= 0 && at < size ? at : -1;  // division is slow
  return at >= 0 && at % stride == 0 && at / stride < size ? at / stride : -1;
}

// The products of float_conv2d.cpp, where channels are convolved by themselves: by a loop over taps.
void convolve_alone(const Convolution& call);
void convolve_alone_back(const Convolution& call);

}  // namespace ttaq
