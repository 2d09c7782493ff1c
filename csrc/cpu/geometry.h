// The sizes of a convolution, in the order in which they are handed over.
#pragma once

#include <stdint.h>

namespace ttaq {

struct Geometry {
  int64_t batch, channels, height, width, outputs, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, step_h, step_w, groups;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t inputs() const { return channels / groups; }  // of a group
  int64_t group_outputs() const { return outputs / groups; }
  int64_t pixels() const { return height * width; }  // of an image
  int64_t out_pixels() const { return out_height * out_width; }
  int64_t tall() const { return height + 2 * pad_h; }  // of an image with its padding
  int64_t wide() const { return width + 2 * pad_w; }
  bool alone() const { return inputs() == 1 && group_outputs() == 1; }  // every channel by itself
};

}  // namespace ttaq
