// Cuts the canonical form (outer, channels, inner) into tasks of some 16 K elements that no thread count changes.
//
// Two ways. Rows: `inner` elements share one scale; a long row is cut into pieces, short rows share a task. Lines:
// where `inner` is too short for a vector loop, scale and zero are laid out element by element over a period, and the
// elements taken as lines of that period, in tiles.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

namespace ttaq {

constexpr int64_t TASK = 16384;  // elements of a piece of a row
constexpr int64_t WIDTH = 1024;  // columns of a tile
constexpr int64_t HEIGHT = 64;   // lines of a tile: as many terms a column adds up in float32
constexpr int64_t SHORT = 16;    // an `inner` below this is short
constexpr int64_t PERIOD = 256;  // no period is below this

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A run of elements within a task: scale[parameter] (of a row) or scale[parameter ..] (of a line) belong to it, and
// its sums go to part[part] or part[part ..].
struct Run {
  int64_t start, size, parameter, part;
};

class Cut {
 public:
  Cut(int64_t outer, int64_t channels, int64_t inner)
      : channels_(channels), inner_(inner), elements_(outer * channels * inner), rows_(outer * channels) {
    lines_ = inner == 1 ? channels > 1 : inner < SHORT && channels * inner <= TASK;
    if (!lines_) return;
    period_ = channels * inner;
    period_ *= ceil_div(PERIOD, period_);
  }

  bool lines() const { return lines_; }

  // How many scales and zeros the kernels read, and which channel the i-th belongs to.
  int64_t parameters() const { return lines_ ? period_ : channels_; }
  int64_t channel(int64_t i) const { return lines_ ? i / inner_ % channels_ : i; }

  int64_t tasks() const {
    if (lines_) return across() * down();
    return pieces() > 1 ? rows_ * pieces() : ceil_div(rows_, rows_per_task());
  }

  // Calls body(run) for every run of the tasks in [first, last).
  template <class Body>
  void walk(int64_t first, int64_t last, const Body& body) const {
    if (lines_) {
      for (int64_t tile = first; tile < last; ++tile) walk_tile(tile, body);
    } else if (pieces() > 1) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t row = task / pieces(), offset = task % pieces() * TASK;
        body(Run{row * inner_ + offset, std::min(TASK, inner_ - offset), row % channels_, task});
      }
    } else {
      const int64_t end = std::min(rows_, last * rows_per_task());
      for (int64_t row = first * rows_per_task(); row < end; ++row)
        body(Run{row * inner_, inner_, row % channels_, row});
    }
  }

  // The partial sums of all runs, and their sums by channel, added in float64 in the order of memory.
  int64_t parts() const { return lines_ ? down() * period_ : rows_ * pieces(); }
  void fold(const std::vector<float>& part, float* total) const {
    std::vector<double> sum(size_t(parameters()), 0.0), all(size_t(channels_), 0.0);
    const int64_t repeats = lines_ ? 1 : pieces();
    for (int64_t i = 0; i < parts(); ++i) sum[size_t(i / repeats % parameters())] += part[size_t(i)];
    for (int64_t i = 0; i < parameters(); ++i) all[size_t(channel(i))] += sum[size_t(i)];
    std::copy(all.begin(), all.end(), total);
  }

 private:
  template <class Body>
  void walk_tile(int64_t tile, const Body& body) const {
    const int64_t column = tile % across() * WIDTH, band = tile / across();
    const int64_t width = std::min(WIDTH, period_ - column);
    for (int64_t line = band * HEIGHT; line < (band + 1) * HEIGHT; ++line) {
      const int64_t start = line * period_ + column;
      if (start >= elements_) return;
      body(Run{start, std::min(width, elements_ - start), column, band * period_ + column});
    }
  }

  int64_t pieces() const { return ceil_div(inner_, TASK); }
  int64_t rows_per_task() const { return std::max<int64_t>(1, TASK / inner_); }
  int64_t across() const { return ceil_div(period_, WIDTH); }
  int64_t down() const { return ceil_div(ceil_div(elements_, period_), HEIGHT); }

  int64_t channels_, inner_, elements_, rows_, period_ = 0;
  bool lines_;
};

// The scales and the rounded zeros, in the order in which the runs of a cut index them.
struct Parameters {
  std::vector<float> scale, zero;

  Parameters(const Cut& cut, const float* scales, const void* zeros, bool zero_is_int) {
    scale.resize(size_t(cut.parameters()));
    zero.resize(scale.size());
    for (int64_t i = 0; i < cut.parameters(); ++i) {
      const int64_t channel = cut.channel(i);
      scale[size_t(i)] = scales[channel];
      zero[size_t(i)] = zero_is_int ? float(static_cast<const int32_t*>(zeros)[channel])
                                    : rintf(static_cast<const float*>(zeros)[channel]);
    }
  }
};

}  // namespace ttaq
