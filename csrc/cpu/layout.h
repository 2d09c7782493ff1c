// Cuts the canonical form (outer, channels, inner) into tasks of some 16 K elements that no thread count changes.
//
// Two ways. Rows: `inner` elements share one scale; a long row is cut into pieces, short rows share a task. Columns:
// where `inner` is too short for a vector loop, scale and zero are laid out element by element over a period, and the
// elements taken as lines of that period, in tiles.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"

namespace ttaq {

constexpr int64_t TASK = 16384;   // elements of a piece of a row
constexpr int64_t HEIGHT = 64;    // lines of a tile; WIDTH columns
constexpr int64_t SHORT = 64;     // an `inner` below this is short
constexpr int64_t SHORTEST = 256;  // no period is below this
constexpr int64_t LONGEST = int64_t(1) << 17;  // and none of several elements a channel above this

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(at, count, channel) for the stretches of the elements [start, start + n) that share a channel, in order.
template <class Body>
void for_each_channel(int64_t start, int64_t n, int64_t channels, int64_t inner, const Body& body) {
  int64_t channel = start / inner % channels, left = inner - start % inner;
  for (int64_t at = 0; at < n; at += left, left = inner, channel = channel + 1 == channels ? 0 : channel + 1)
    body(at, std::min(left, n - at), channel);
}

// A block of elements within a task. scale[parameter] (or scale[parameter ..], one for each element of a line) belong
// to it, and its sums go to part[part] (or part[part ..]).
struct Run {
  int64_t start;
  Block block;
  int64_t parameter, part;
};

class Cut {
 public:
  Cut(int64_t outer, int64_t channels, int64_t inner)
      : channels_(channels), inner_(inner), elements_(outer * channels * inner), rows_(outer * channels) {
    columns_ = inner == 1 ? channels > 1 : inner < SHORT && channels * inner <= LONGEST;
    if (!columns_) return;
    period_ = channels * inner;
    period_ *= ceil_div(SHORTEST, period_);
  }

  bool columns() const { return columns_; }

  // How many scales and zeros the kernels read, and which channel the i-th belongs to.
  int64_t parameters() const { return columns_ ? period_ : channels_; }
  int64_t channel(int64_t i) const { return columns_ ? i / inner_ % channels_ : i; }

  int64_t tasks() const {
    if (columns_) return across() * down();
    return pieces() > 1 ? rows_ * pieces() : ceil_div(rows_, rows_per_task());
  }

  // Calls body(run) for every run of the tasks in [first, last).
  template <class Body>
  void walk(int64_t first, int64_t last, const Body& body) const {
    if (columns_) {
      for (int64_t tile = first; tile < last; ++tile) walk_tile(tile, body);
    } else if (pieces() > 1) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t row = task / pieces(), offset = task % pieces() * TASK;
        body(Run{row * inner_ + offset, {std::min(TASK, inner_ - offset), 1, 0}, row % channels_, task});
      }
    } else {
      const int64_t end = std::min(rows_, last * rows_per_task());
      for (int64_t row = first * rows_per_task(); row < end; ++row)
        body(Run{row * inner_, {inner_, 1, 0}, row % channels_, row});
    }
  }

  // How many partial sums all runs have, and their sums by channel, added in the order of memory.
  int64_t parts() const { return columns_ ? down() * period_ : rows_ * pieces(); }
  void fold(const std::vector<double>& part, float* total) const {
    fold(part, 0.0, [](double a, double b) { return a + b; }, total);
  }

  // The same for any way of putting two values together.
  template <class Value, class Combine>
  void fold(const std::vector<Value>& part, Value start, const Combine& combine, float* total) const {
    const int64_t repeats = columns_ ? 1 : pieces();
    std::vector<Value> all(size_t(parameters()), start), by_channel(size_t(channels_), start);
    for (const Value* next = part.data(); next < part.data() + parts();)
      for (Value& one : all)
        for (int64_t piece = 0; piece < repeats; ++piece) one = combine(one, *next++);
    for (int64_t i = 0; i < parameters(); ++i) {
      Value& one = by_channel[size_t(channel(i))];
      one = combine(one, all[size_t(i)]);
    }
    std::copy(by_channel.begin(), by_channel.end(), total);
  }

 private:
  template <class Body>
  void walk_tile(int64_t tile, const Body& body) const {
    const int64_t column = tile % across() * WIDTH, band = tile / across();
    const int64_t width = std::min(WIDTH, period_ - column), part = band * period_ + column;
    const int64_t start = band * HEIGHT * period_ + column;
    if (start >= elements_) return;
    const int64_t whole = elements_ - start < width ? 0 : (elements_ - start - width) / period_ + 1;
    if (whole) body(Run{start, {width, std::min(HEIGHT, whole), period_}, column, part});
    const int64_t rest = elements_ - start - whole * period_;  // of a last line that ends within this column
    if (whole < HEIGHT && rest > 0) body(Run{start + whole * period_, {rest, 1, 0}, column, part});
  }

  int64_t pieces() const { return ceil_div(inner_, TASK); }
  int64_t rows_per_task() const { return std::max<int64_t>(1, TASK / inner_); }
  int64_t across() const { return ceil_div(period_, WIDTH); }
  int64_t down() const { return ceil_div(ceil_div(elements_, period_), HEIGHT); }

  int64_t channels_, inner_, elements_, rows_, period_ = 0;
  bool columns_;
};

// The scales and the rounded zeros, in the order in which the runs of a cut index them.
class Parameters {
 public:
  Parameters(const Cut& cut, const float* scales, const void* zeros, bool zero_is_int) : scale(scales) {
    zeros_.resize(size_t(cut.parameters()));
    for (int64_t i = 0; i < cut.parameters(); ++i) {
      const int64_t channel = cut.channel(i);
      zeros_[size_t(i)] = zero_is_int ? float(static_cast<const int32_t*>(zeros)[channel])
                                      : rintf(static_cast<const float*>(zeros)[channel]);
    }
    zero = zeros_.data();
    if (!cut.columns()) return;
    scales_.resize(zeros_.size());
    for (int64_t i = 0; i < cut.parameters(); ++i) scales_[size_t(i)] = scales[cut.channel(i)];
    scale = scales_.data();
  }
  Parameters(const Parameters&) = delete;

  const float *scale, *zero;

 private:
  std::vector<float> scales_, zeros_;
};

}  // namespace ttaq
