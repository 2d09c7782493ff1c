// Convolutions of floats with packed weights, as products over pixels. The forward multiplies what each output pixel
// sees, where it lies or gathered; the backward points, tap by tap, to what each input pixel gave to.
#include "float_conv2d.h"

namespace ttaq {
namespace {

constexpr int64_t PIXELS = 72;  // of a task that gathers

// Writes what output pixel `pixel` sees of a group, from element `first` to `last` of a row of weights; padding is 0.0.
void gather(const Geometry& g, const float* x, int64_t pixel, int64_t group, int64_t first, int64_t last,
            float* out) {
  const int64_t image = pixel / g.out_pixels(), line = pixel / g.out_width % g.out_height;
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

// The images with their padding around them: the taps of every output pixel then lie alike.
class Padded {
 public:
  Padded(const Geometry& g, const float* x, bool wanted, int threads) : g_(g), first_(x) {
    if (!wanted || (!g.pad_h && !g.pad_w)) return;
    const int64_t line = g_.wide() * g.channels, margin = g.pad_w * g.channels, inner = g.width * g.channels;
    copy_ = allocate(g.batch * g_.tall() * line);
    first_ = copy_.get();
    parallel_for(g.batch * g_.tall(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* to = copy_.get() + i * line;
        const int64_t h = i % g_.tall() - g.pad_h;
        const bool inside = h >= 0 && h < g.height;
        std::fill_n(to, inside ? margin : line, 0.0f);
        if (!inside) continue;
        memcpy(to + margin, x + (i / g_.tall() * g.height + h) * inner, size_t(inner) * sizeof(float));
        std::fill_n(to + margin + inner, margin, 0.0f);
      }
    });
  }

  // The first tap of an output pixel.
  const float* row(int64_t pixel, int64_t group) const {
    const int64_t line = pixel / g_.out_width;
    const int64_t at = line / g_.out_height * g_.tall() + line % g_.out_height * g_.stride_h;
    return first_ + (at * g_.wide() + pixel % g_.out_width * g_.stride_w) * g_.channels + group * g_.inputs();
  }

 private:
  const Geometry& g_;
  const float* first_;
  Floats copy_;
};

// How a row of weights is cut into runs that lie side by side in padded images: none where one would not fill vectors.
struct RunsOfTaps {
  int64_t depth = 0, most = 0;  // of a run; runs of a tile
  std::vector<int64_t> offsets;

  explicit RunsOfTaps(const Geometry& g) {
    const int64_t taps = g.groups == 1 && g.step_w == 1 ? g.kernel_w : 1, run = taps * g.inputs();
    if (run % PADDING) return;
    int64_t pieces = ceil_div(run, DEPTH);
    while (run % (pieces * PADDING)) ++pieces;
    depth = run / pieces;
    most = DEPTH / depth;
    for (int64_t tap = 0; tap < g.taps(); tap += taps) {
      const int64_t pixels = tap / g.kernel_w * g.step_h * g.wide() + tap % g.kernel_w * g.step_w;
      for (int64_t piece = 0; piece < pieces; ++piece) offsets.push_back(pixels * g.channels + piece * depth);
    }
  }
};

// A block of output pixels against a block of outputs of a group.
struct Area {
  int64_t first, m, group, output, n;
};

// Multiplies where the pixels lie.
void add_runs(const Convolution& call, const Area& area, const Padded& images, const RunsOfTaps& runs, float* tile,
              float* sums) {
  const float* rows[MOST_ROWS];
  for (int64_t i = 0; i < area.m; ++i) rows[i] = images.row(area.first + i, area.group);
  const Parts parts(int64_t(runs.offsets.size()), runs.most, 1);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t run = parts.start(part), count = parts.length(part);
    add_outputs(*call.kernels, call.weights, call.bits, rows, area.m, {&runs.offsets[size_t(run)], count, runs.depth},
                area.output, area.n, run * runs.depth, count * runs.depth, tile, sums);
  }
}

// Multiplies what it gathers in `seen`.
void add_gathered(const Convolution& call, const Area& area, float* tile, float* seen, float* sums) {
  const float* rows[PIXELS];
  for (int64_t i = 0; i < area.m; ++i) rows[i] = seen + i * LINE;
  const Parts depth(call.g.taps() * call.g.inputs(), DEPTH, PADDING);
  for (int64_t part = 0; part < depth.count; ++part) {
    const int64_t start = depth.start(part), length = depth.length(part), none = 0;
    for (int64_t i = 0; i < area.m; ++i) {
      gather(call.g, call.source, area.first + i, area.group, start, start + length, seen + i * LINE);
      std::fill(seen + i * LINE + length, seen + i * LINE + padded(length), 0.0f);
    }
    add_outputs(*call.kernels, call.weights, call.bits, rows, area.m, {&none, 1, padded(length)}, area.output,
                area.n, start, length, tile, sums);
  }
}

void convolve(const Convolution& call) {
  const Geometry& g = call.g;
  const RunsOfTaps runs(g);
  const Padded images(g, call.source, runs.depth > 0, call.threads);
  const Parts pixels(g.batch * g.out_pixels(), runs.depth ? MOST_ROWS : PIXELS, 1);
  const Parts outputs(g.group_outputs(), OUTPUTS, TOGETHER);
  const int64_t down = g.groups * outputs.count;
  parallel_for(pixels.count * down, call.threads, [&](int64_t begin, int64_t end) {
    const Floats tile = allocate(OUTPUTS * LINE), seen = allocate(runs.depth ? 0 : PIXELS * LINE);
    alignas(64) float sums[MOST_ROWS * OUTPUTS];
    int64_t pixel[MOST_ROWS];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t at = task / down, group = task % down / outputs.count, part = task % outputs.count;
      const Area area{pixels.start(at), pixels.length(at), group,
                      group * g.group_outputs() + outputs.start(part), outputs.length(part)};
      for (int64_t i = 0; i < area.m; ++i) {
        pixel[i] = area.first + i;
        for (int64_t j = 0; j < OUTPUTS; ++j)
          sums[i * OUTPUTS + j] = call.bias && j < area.n ? call.bias[area.output + j] : 0.0f;
      }
      if (runs.depth)
        add_runs(call, area, images, runs, tile.get(), sums);
      else
        add_gathered(call, area, tile.get(), seen.get(), sums);
      call.target.write(sums, OUTPUTS, pixel, area.m, area.output, area.n);
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

// A block of input pixels against a panel of inputs of a group.
void gather_panel(const Convolution& call, const Task& task, int64_t group, int64_t input, const float* nothing) {
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

void convolve_back(const Convolution& call) {
  const Geometry& g = call.g;
  const std::vector<Task> tasks = tasks_of(g);
  const std::vector<float> nothing(size_t(g.group_outputs()), 0.0f);
  const int64_t panels = ceil_div(g.inputs(), PANEL), each = g.groups * panels;
  parallel_for(int64_t(tasks.size()) * each, call.threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      gather_panel(call, tasks[size_t(task / each)], task % each / panels, task % panels * PANEL, nothing.data());
  });
}

}  // namespace
}  // namespace ttaq

using namespace ttaq;

namespace {

int resolve(Convolution& call, const float* source, const uint8_t* words, const float* scale, const int32_t* zero,
            const float* bias, int bits, const int64_t* geometry, int threads, int level) {
  memcpy(&call.g, geometry, sizeof call.g);
  call.weights = weights_of(words, scale, zero, bits, 0, call.g.outputs, call.g.taps() * call.g.inputs());
  call.bits = bits, call.source = source, call.bias = bias, call.threads = threads;
  return find(&call.kernels, level, bits);
}

}  // namespace

int ttaq_cpu_packed_conv2d_floats(const float* x, const uint8_t* words, const float* scale, const int32_t* zero,
                                  const float* bias, float* y, int bits, int channels_last, const int64_t* geometry,
                                  int threads, int level) {
  Convolution call;
  if (const int error = resolve(call, x, words, scale, zero, bias, bits, geometry, threads, level)) return error;
  call.target = {y, call.g.outputs, call.g.out_pixels(), channels_last != 0};
  try {
    call.g.alone() ? convolve_alone(call) : convolve(call);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}

int ttaq_cpu_packed_conv2d_backward(const float* grad, const uint8_t* words, const float* scale, const int32_t* zero,
                                    float* dx, int bits, int channels_last, const int64_t* geometry, int threads,
                                    int level) {
  Convolution call;
  if (const int error = resolve(call, grad, words, scale, zero, nullptr, bits, geometry, threads, level)) return error;
  call.target = {dx, call.g.channels, call.g.pixels(), channels_last != 0};
  try {
    call.g.alone() ? convolve_alone_back(call) : convolve_back(call);
  } catch (const std::bad_alloc&) {
    return TTAQ_NO_MEMORY;
  }
  return TTAQ_OK;
}
