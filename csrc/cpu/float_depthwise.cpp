// Convolutions of floats where every channel is convolved by itself: a loop over taps, along the channels.
#include "float_conv2d.h"

namespace ttaq {
namespace {

constexpr int64_t PIXELS = 72;  // of a task,
constexpr int64_t ALONE = 256;  // and its channels at most

// The values that meet in one pixel, and the taps through which they do.
struct Meeting {
  std::vector<const float*> values, weights;

  explicit Meeting(const Geometry& g) {
    values.reserve(size_t(g.taps()));
    weights.reserve(size_t(g.taps()));
  }
  void clear() {
    values.clear();
    weights.clear();
  }
  void add(const float* value, const float* weight) {
    values.push_back(value);
    weights.push_back(weight);
  }
};

void meet_forward(const Convolution& call, int64_t pixel, int64_t channel, const float* weights, Meeting& meeting) {
  const Geometry& g = call.g;
  const int64_t line = pixel / g.out_width, image = line / g.out_height;
  const int64_t top = line % g.out_height * g.stride_h - g.pad_h, left = pixel % g.out_width * g.stride_w - g.pad_w;
  for (int64_t r = 0; r < g.kernel_h; ++r) {
    const int64_t h = top + r * g.step_h;
    if (h < 0 || h >= g.height) continue;
    const float* values = call.source + ((image * g.height + h) * g.width + left) * g.channels + channel;
    for (int64_t s = 0, w = left; s < g.kernel_w; ++s, w += g.step_w)
      if (w >= 0 && w < g.width)
        meeting.add(values + s * g.step_w * g.channels, weights + (r * g.kernel_w + s) * ALONE);
  }
}

void meet_back(const Convolution& call, int64_t pixel, int64_t channel, const float* weights, Meeting& meeting) {
  const Geometry& g = call.g;
  const int64_t line = pixel / g.width, image = line / g.height, h = line % g.height, w = pixel % g.width;
  for (int64_t r = 0; r < g.kernel_h; ++r) {
    const int64_t y = reached(h, g.pad_h, r * g.step_h, g.stride_h, g.out_height);
    if (y < 0) continue;
    const float* values = call.source + (image * g.out_height + y) * g.out_width * g.channels + channel;
    for (int64_t s = 0; s < g.kernel_w; ++s) {
      const int64_t x = reached(w, g.pad_w, s * g.step_w, g.stride_w, g.out_width);
      if (x >= 0) meeting.add(values + x * g.channels, weights + (r * g.kernel_w + s) * ALONE);
    }
  }
}

// Adds up, in each pixel, the values that meet there.
template <class Meet>
void add_up(const Convolution& call, int64_t pixels, const Meet& meet) {
  const Geometry& g = call.g;
  const Parts blocks(pixels, PIXELS, 1), channels(g.channels, ALONE, 1);
  const int64_t taps = g.taps(), row = padded(taps);
  parallel_for(blocks.count * channels.count, call.threads, [&](int64_t begin, int64_t end) {
    const Floats rows = allocate(ALONE * row), weights = allocate(taps * ALONE), sums = allocate(PIXELS * ALONE);
    Meeting meeting(g);
    int64_t pixel[PIXELS];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / blocks.count, block = task % blocks.count;
      const int64_t channel = channels.start(part), n = channels.length(part), m = blocks.length(block);
      if (task == begin || block == 0) {
        call.kernels->dequantise[call.bits](call.weights, channel, n, 0, taps, rows.get(), row);
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t i = 0; i < n; ++i) weights[size_t(tap * ALONE + i)] = rows[size_t(i * row + tap)];
      }
      for (int64_t i = 0; i < m; ++i) {
        float* sum = sums.get() + i * ALONE;
        for (int64_t j = 0; j < n; ++j) sum[j] = call.bias ? call.bias[channel + j] : 0.0f;
        pixel[i] = blocks.start(block) + i;
        meeting.clear();
        meet(call, pixel[i], channel, weights.get(), meeting);
        call.kernels->weigh(meeting.values.data(), meeting.weights.data(), int64_t(meeting.values.size()), n, sum);
      }
      call.target.write(sums.get(), ALONE, pixel, m, channel, n);
    }
  });
}

}  // namespace

void convolve_alone(const Convolution& call) { add_up(call, call.g.batch * call.g.out_pixels(), meet_forward); }

void convolve_alone_back(const Convolution& call) { add_up(call, call.g.batch * call.g.pixels(), meet_back); }

}  // namespace ttaq
