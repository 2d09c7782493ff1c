// Convolutions of floats with packed weights, as products over pixels: channels lie innermost, in the images as in the
// rows of the weights. The forward gathers what each output pixel sees; the backward points, tap by tap, to what each
// input pixel gave to. Where every channel is convolved by itself there is no product, but a loop over taps.
#include <string.h>

#include "float_product.h"

namespace ttaq {
namespace {

constexpr int64_t PIXELS = 72;  // gathered by a task of the forward,
constexpr int64_t ALONE = 256;  // channels of a task that are convolved by themselves

struct Geometry {
  int64_t batch, channels, height, width, outputs, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, step_h, step_w, groups;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t inputs() const { return channels / groups; }  // of a group
  int64_t group_outputs() const { return outputs / groups; }
  int64_t pixels() const { return batch * height * width; }
  int64_t out_pixels() const { return batch * out_height * out_width; }
  bool alone() const { return inputs() == 1 && group_outputs() == 1; }
};

// Images of float32 that are written: `apart` floats between channels, images and pixels numbered through.
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

struct Call {
  const FloatKernels* kernels;
  Geometry g;
  Weights weights;
  int bits;
  const float *source, *bias;
  Images target;
  int threads;
};

// Writes what output pixel `pixel` sees of a group, from element `first` to `last` of a row of weights; padding is 0.0.
void gather(const Geometry& g, const float* x, int64_t pixel, int64_t group, int64_t first, int64_t last, float* out) {
  const int64_t image = pixel / (g.out_height * g.out_width), line = pixel / g.out_width % g.out_height;
  const int64_t top = line * g.stride_h - g.pad_h, left = pixel % g.out_width * g.stride_w - g.pad_w;
  const bool side_by_side = g.groups == 1 && g.step_w == 1;  // the taps of a line, in memory
  const int64_t taps = side_by_side ? g.kernel_w : 1, c = g.inputs(), run = taps * c;
  for (int64_t i = first / run; i * run < last; ++i) {
    const int64_t tap = i * taps, h = top + tap / g.kernel_w * g.step_h, w = left + tap % g.kernel_w * g.step_w;
    const int64_t from = std::max<int64_t>(first - i * run, 0), to = std::min(last - i * run, run);
    const bool inside = h >= 0 && h < g.height;
    const int64_t low = inside ? std::min(std::max(from, -w * c), to) : to;
    const int64_t high = std::max(low, std::min(to, (g.width - w) * c));
    float* row = out + i * run - first;
    std::fill(row + from, row + low, 0.0f);
    const int64_t start = ((image * g.height + h) * g.width + w) * g.channels + group * c;
    if (low < high) memcpy(row + low, x + start + low, size_t(high - low) * sizeof(float));
    std::fill(row + high, row + to, 0.0f);
  }
}

// A block of output pixels against a block of outputs of a group.
void convolve_block(const Call& call, int64_t first, int64_t m, int64_t group, int64_t output, int64_t n, float* tile,
                    float* seen) {
  const Geometry& g = call.g;
  alignas(64) float sums[PIXELS * OUTPUTS];
  const float* rows[PIXELS];
  int64_t pixel[PIXELS];
  for (int64_t i = 0; i < m; ++i) {
    rows[i] = seen + i * LINE;
    pixel[i] = first + i;
    for (int64_t j = 0; j < OUTPUTS; ++j) sums[i * OUTPUTS + j] = call.bias && j < n ? call.bias[output + j] : 0.0f;
  }
  const Parts depth(g.taps() * g.inputs(), DEPTH, PADDING);
  for (int64_t part = 0; part < depth.count; ++part) {
    const int64_t start = depth.start(part), length = depth.length(part);
    for (int64_t i = 0; i < m; ++i) {
      gather(g, call.source, first + i, group, start, start + length, seen + i * LINE);
      std::fill(seen + i * LINE + length, seen + i * LINE + padded(length), 0.0f);
    }
    add_outputs(*call.kernels, call.weights, call.bits, rows, m, 0, output, n, start, length, tile, sums);
  }
  call.target.write(sums, OUTPUTS, pixel, m, output, n);
}

void convolve(const Call& call) {
  const Geometry& g = call.g;
  const Parts pixels(g.out_pixels(), PIXELS, 1), outputs(g.group_outputs(), OUTPUTS, TOGETHER);
  const int64_t down = g.groups * outputs.count;
  parallel_for(pixels.count * down, call.threads, [&](int64_t begin, int64_t end) {
    const Floats tile = allocate(OUTPUTS * LINE), seen = allocate(PIXELS * LINE);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / down, group = task % down / outputs.count, part = task % outputs.count;
      const int64_t output = group * g.group_outputs() + outputs.start(part);
      convolve_block(call, pixels.start(block), pixels.length(block), group, output, outputs.length(part), tile.get(),
                     seen.get());
    }
  });
}

// Input pixels whose lines and columns leave the same rest by the strides: the same taps reach them. They are numbered
// through the images.
struct Phase {
  int64_t top, left, lines, columns;

  Phase(const Geometry& g, int64_t top_, int64_t left_) : top(top_), left(left_) {
    lines = ceil_div(std::max<int64_t>(0, g.height - top), g.stride_h);
    columns = ceil_div(std::max<int64_t>(0, g.width - left), g.stride_w);
  }
};

struct Task {
  Phase phase;
  int64_t first, m;
};

std::vector<Task> tasks_of(const Geometry& g) {
  std::vector<Task> tasks;
  for (int64_t top = 0; top < g.stride_h; ++top)
    for (int64_t left = 0; left < g.stride_w; ++left) {
      const Phase phase(g, top, left);
      const Parts parts(g.batch * phase.lines * phase.columns, MOST_ROWS, 1);
      for (int64_t part = 0; part < parts.count; ++part)
        tasks.push_back({phase, parts.start(part), parts.length(part)});
    }
  return tasks;
}

// The line, or column, of the output that reached `position` of the input through a tap, or -1.
inline int64_t reached(int64_t position, int64_t pad, int64_t back, int64_t stride, int64_t size) {
  const int64_t at = position + pad - back;
  if (stride == 1) return at >= 0 && at < size ? at : -1;  // division is slow
  return at >= 0 && at % stride == 0 && at / stride < size ? at / stride : -1;
}

// A block of input pixels against a panel of inputs of a group.
void gather_panel(const Call& call, const Task& task, int64_t group, int64_t input, const float* nothing) {
  const Geometry& g = call.g;
  alignas(64) float tile[LINES * PANEL], sums[MOST_ROWS * PANEL];
  const float* rows[MOST_ROWS];
  int64_t pixel[MOST_ROWS], image[MOST_ROWS], h[MOST_ROWS], w[MOST_ROWS];
  for (int64_t i = 0; i < task.m; ++i) {
    const int64_t at = task.first + i, line = at / task.phase.columns;
    image[i] = line / task.phase.lines;
    h[i] = task.phase.top + line % task.phase.lines * g.stride_h;
    w[i] = task.phase.left + at % task.phase.columns * g.stride_w;
    pixel[i] = (image[i] * g.height + h[i]) * g.width + w[i];
  }
  std::fill_n(sums, task.m * PANEL, 0.0f);
  const int64_t c = g.inputs(), n = std::min(PANEL, c - input), outputs = g.group_outputs();
  for (int64_t tap = 0; tap < g.taps(); ++tap) {
    const int64_t down = tap / g.kernel_w * g.step_h, across = tap % g.kernel_w * g.step_w;  // from the first tap
    bool any = false;
    for (int64_t i = 0; i < task.m; ++i) {
      const int64_t y = reached(h[i], g.pad_h, down, g.stride_h, g.out_height);
      const int64_t x = reached(w[i], g.pad_w, across, g.stride_w, g.out_width);
      const bool valid = y >= 0 && x >= 0;
      any |= valid;
      rows[i] = valid ? call.source + ((image[i] * g.out_height + y) * g.out_width + x) * g.outputs + group * outputs
                      : nothing;
    }
    if (any)
      add_inputs(*call.kernels, call.weights, call.bits, rows, task.m, group * outputs, outputs, tap * c + input, n,
                 tile, sums);
  }
  call.target.write(sums, PANEL, pixel, task.m, group * c + input, n);
}

void convolve_back(const Call& call) {
  const Geometry& g = call.g;
  const std::vector<Task> tasks = tasks_of(g);
  const std::vector<float> nothing(size_t(g.group_outputs()), 0.0f);
  const int64_t panels = ceil_div(g.inputs(), PANEL), each = g.groups * panels;
  parallel_for(int64_t(tasks.size()) * each, call.threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      gather_panel(call, tasks[size_t(task / each)], task % each / panels, task % panels * PANEL, nothing.data());
  });
}

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

void meet_forward(const Call& call, int64_t pixel, int64_t channel, const float* weights, Meeting& meeting) {
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

void meet_back(const Call& call, int64_t pixel, int64_t channel, const float* weights, Meeting& meeting) {
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

// Convolves channels by themselves, or takes that back, as `meet` says.
template <class Meet>
void convolve_alone(const Call& call, int64_t pixels, const Meet& meet) {
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
}  // namespace ttaq

using namespace ttaq;

int ttaq_cpu_packed_conv2d_floats(const float* x, const uint8_t* words, const float* scale, const int32_t* zero,
                                  const float* bias, float* y, int bits, int channels_last, const int64_t* geometry,
                                  int threads, int level) {
  Call call;
  memcpy(&call.g, geometry, sizeof call.g);
  const Geometry& g = call.g;
  if (const int error = find(&call.kernels, level, bits)) return error;
  call.weights = weights_of(words, scale, zero, bits, 0, g.outputs, g.taps() * g.inputs());
  call.bits = bits, call.source = x, call.bias = bias, call.threads = threads;
  call.target = {y, g.outputs, g.out_height * g.out_width, channels_last != 0};
  try {
    if (g.alone())
      convolve_alone(call, g.out_pixels(), meet_forward);
    else
      convolve(call);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}

int ttaq_cpu_packed_conv2d_backward(const float* grad, const uint8_t* words, const float* scale, const int32_t* zero,
                                    float* dx, int bits, int channels_last, const int64_t* geometry, int threads,
                                    int level) {
  Call call;
  memcpy(&call.g, geometry, sizeof call.g);
  const Geometry& g = call.g;
  if (const int error = find(&call.kernels, level, bits)) return error;
  call.weights = weights_of(words, scale, zero, bits, 0, g.outputs, g.taps() * g.inputs());
  call.bits = bits, call.source = grad, call.bias = nullptr, call.threads = threads;
  call.target = {dx, g.channels, g.height * g.width, channels_last != 0};
  try {
    if (g.alone())
      convolve_alone(call, g.pixels(), meet_back);
    else
      convolve_back(call);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}
