// The walk of rows past strips of a quantized weight. A strip is unpacked once, to the L2 cache; then
// groups of rows meet all of it one after the other. A group is finished as soon as its sums are
// complete, so that its stores drain while the next tile runs.
#pragma once
#include "cpu/integers.h"
#include "cpu/quant_kernels.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// What is unpacked next, asked for a few lines at a time while tiles run: all of it at once would be
// waited for.
class Upcoming {
 public:
  void add(const QuantKernel& q, const StripPanels& strip, int64_t column, int64_t columns) {
    for (int p = 0; p < strip.count; ++p) {
      if (!strip.panels[p].codes) continue;
      add(strip.panels[p].codes + column * q.column_codes(), columns * q.column_codes());
      add(strip.panels[p].scales + q.panel_scales * column / q.k, q.panel_scales * columns / q.k);
    }
  }
  // In so many steps.
  void divide(int64_t steps) { share_ = divide_up(lines_, steps); }
  void step() {
    for (int64_t n = 0; n < share_ && next_ < count_; ++n) {
      __builtin_prefetch(ranges_[next_].at, 0, 2);
      if ((ranges_[next_].at += 64) >= ranges_[next_].end) ++next_;
    }
  }

 private:
  struct Range {
    const uint8_t *at, *end;
  };
  void add(const uint8_t* at, int64_t bytes) {
    if (bytes <= 0) return;
    ranges_[count_++] = {at, at + bytes};
    lines_ += divide_up(bytes, 64);
  }
  Range ranges_[2 * 3 * kWideStrip];  // of at most three strips
  int count_ = 0, next_ = 0;
  int64_t lines_ = 0, share_ = 0;
};

// Groups [first, last) of rows times `count` strips that are finished together, those of a gate and
// of an up. `next`: the strips that this thread reads afterwards, or null. done(group, sums, size)
// gets sums[width][columns] of the first strip; those of another lie `size` behind.
template <class Done>
FASTLLM_INLINE void multiply_strips(const QuantKernel& q, const StripPanels* strips, int count,
                                    const StripPanels* next, const RowGroups& x, int64_t first,
                                    int64_t last, bool few, const Done& done) {
  const int panels = strips[0].count;
  const StripPlan plan = strip_plan(q, panels, count, few);
  const int64_t group_sums = x.width * panels * kPanelRows;
  const bool whole = plan.stretch >= q.k;
  const int64_t size = whole ? group_sums : (last - first) * group_sums;
  uint8_t* unpacked = static_cast<uint8_t*>(
      thread_scratch(Scratch::panels, static_cast<size_t>(count * plan.unpacked)));
  float* sums = static_cast<float*>(
      thread_scratch(Scratch::sums, static_cast<size_t>(count * size) * sizeof(float)));
  SegmentTile *const tile = segment_tile(q, x.width, few), *const last_tile = segment_tile(
                                                               q,
                                                               x.rows - (x.groups() - 1) * x.width,
                                                               few);
  int64_t column = 0;
  do {
    const int64_t end = smaller(column + plan.stretch, q.k);
    // Few rows are done before what comes next has arrived: they look two stretches ahead.
    const int64_t later = column + (few ? 2 : 1) * plan.stretch;
    const bool inside = later < q.k;
    const int64_t from = inside ? later : few ? (later - q.k) / kBlock * kBlock : 0;
    const bool known = (inside || (next && later - plan.stretch < q.k)) && from < q.k;
    Upcoming upcoming;
    for (int s = 0; s < count; ++s) {
      const StripPanels* ahead = !known ? nullptr : inside ? &strips[s] : &next[s];
      uint8_t* codes = unpacked + s * plan.unpacked;
      unpack_strip(q, strips[s], column, end - column, codes,
                   reinterpret_cast<float*>(codes + plan.scales_at), few ? ahead : nullptr, from);
      if (!few && ahead) upcoming.add(q, *ahead, from, smaller(plan.stretch, q.k - from));
    }
    upcoming.divide(last - first);
    for (int64_t g = first; g < last; ++g) {
      const char* rows = x.group(g) + q.row_offset(column) * x.width;
      float* to = whole ? sums : sums + (g - first) * group_sums;
      for (int s = 0; s < count; ++s) {
        const uint8_t* codes = unpacked + s * plan.unpacked;
        const float* scales = reinterpret_cast<const float*>(codes + plan.scales_at);
        const Segment segment{codes, scales, end - column, q.chunk, q.sums, column == 0};
        (g + 1 < x.groups() ? tile : last_tile)(segment, rows, x.width, to + s * size);
      }
      if (end == q.k) done(g, to, size);
      upcoming.step();
    }
  } while ((column += plan.stretch) < q.k);
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
