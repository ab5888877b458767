// The rows' half of the backward of experts: from dy through `down` and the activation to dpre, the
// gate weights' gradients, and through `gate_up` to dx. The weights come in strips of columns from
// whoever holds them, dense or packed.
#pragma once
#include "cpu/experts.h"
#include "cpu/gated_activation.h"
#include "ops_moe.h"

namespace fastllm::FASTLLM_ISA {
namespace {

FASTLLM_INLINE vf rounded_to(vf x, const float*) { return x; }
FASTLLM_INLINE vf rounded_to(vf x, const uint16_t*) { return vround_bf16(x); }

// n pairs (gate, up) of two vectors, each rounded once.
template <class T>
FASTLLM_INLINE void store_pairs(T* to, vf gate, vf up, int64_t n) {
  T g[VL], u[VL];
  store(g, gate);
  store(u, up);
  for (int64_t i = 0; i < n; ++i) to[2 * i] = g[i], to[2 * i + 1] = u[i];
}

// 16 lanes, whatever a vector holds, so that every level sums in the same order.
FASTLLM_INLINE float sum_of_lanes(const float* lanes) {
  float total = 0.f;
  for (int i = 0; i < kPanelRows; ++i) total += lanes[i];
  return total;
}

// Weights: down(expert, panel, count, to) brings panels of columns of down[e] [hidden, inner], and
// gate_up(...) of gate_up[e] [2 inner, hidden].
template <class D, class Weights>
struct RowsBackward {
  using T = Element<D>;
  const MoeRows& a;
  const Weights& weights;
  const Team& team;
  const T *dy, *pre;
  T *dpre, *weighted;
  RowBlocks blocks;

  RowsBackward(const MoeRows& rows, const Weights& w, const Team& t)
      : a(rows),
        weights(w),
        team(t),
        dy(static_cast<const T*>(rows.dy)),
        pre(static_cast<const T*>(rows.pre)),
        dpre(static_cast<T*>(rows.dpre)),
        weighted(static_cast<T*>(rows.weighted)),
        blocks(rows.rows, larger(rows.hidden, 2 * rows.inner) * static_cast<int64_t>(sizeof(T)),
               t) {}

  Span rows_of(int64_t expert) const { return expert_span(a.offsets, expert, a.rows); }
  // The slot of a row, or -1; its token.
  int64_t slot_of(int64_t row) const {
    const int64_t slot = a.slots[row];
    return slot < a.tokens * a.per_token ? slot : -1;
  }
  int64_t token_of(int64_t row) const {
    const int64_t slot = slot_of(row);
    return slot < 0 ? 0 : static_cast<uint32_t>(slot) / static_cast<uint32_t>(a.per_token);
  }

  // dpre, and the activation times w, of columns [column, column + columns) of a row whose
  // gradients after `down` are da; what the columns add to the gate weight's gradient in 16 lanes.
  template <Gating gating>
  void through_activation(int64_t row, int64_t column, int64_t columns, const float* da, float w,
                          float* lanes) const {
    const T *gate = pre + row * 2 * a.inner + column, *up = gate + a.inner;
    T* to = dpre + row * 2 * a.inner;
    T *dgate = to + column, *dup = dgate + a.inner, *pairs = to + 2 * column;
    T* wa = weighted ? weighted + row * a.inner + column : nullptr;
    int64_t c = 0;
    for (; c + VL <= columns; c += VL) {
      const vf d = vload(da + c), wd = w * d;
      const GatedSlopes s = gated_slopes<gating>(load(gate + c), load(up + c));
      const vf value = rounded_to(s.value, gate);
      float* lane = lanes + c % kPanelRows;
      vstore(lane, vfma(d, value, vload(lane)));
      if (a.paired) {
        store_pairs(pairs + 2 * c, s.by_gate * wd, s.by_up * wd, VL);
      } else {
        store(dgate + c, s.by_gate * wd);
        store(dup + c, s.by_up * wd);
      }
      if (wa) store(wa + c, w * value);
    }
    if (const int64_t rest = columns - c; rest > 0) {
      const vf d = load_n(da + c, rest), wd = w * d;
      const GatedSlopes s = gated_slopes<gating>(load_n(gate + c, rest), load_n(up + c, rest));
      const vf value = rounded_to(s.value, gate);
      float* lane = lanes + c % kPanelRows;
      vstore(lane, vfma(d, value, vload(lane)));
      if (a.paired) {
        store_pairs(pairs + 2 * c, s.by_gate * wd, s.by_up * wd, rest);
      } else {
        store_n(dgate + c, s.by_gate * wd, rest);
        store_n(dup + c, s.by_up * wd, rest);
      }
      if (wa) store_n(wa + c, w * value, rest);
    }
  }

  float dot_bias(const T* g, const char* bias) const {
    alignas(64) float lanes[kPanelRows] = {};
    dispatch_float(a.down_bias_type, [&](auto t) {
      const auto* b = reinterpret_cast<const decltype(t)*>(bias);
      int64_t c = 0;
      for (; c + VL <= a.hidden; c += VL) {
        float* lane = lanes + c % kPanelRows;
        vstore(lane, vfma(load(g + c), load(b + c), vload(lane)));
      }
      for (; c < a.hidden; ++c) lanes[c % kPanelRows] += load1(g + c) * load1(b + c);
    });
    return sum_of_lanes(lanes);
  }

  // A block of an expert's rows.
  template <Gating gating>
  void run_block(int64_t expert, Span rows) const {
    constexpr int R = kDenseRows;
    const int64_t groups = divide_up(rows.size(), R);
    const int64_t most = larger(a.hidden, 2 * a.inner);
    auto* packed = static_cast<uint32_t*>(thread_scratch(
        Scratch::rows, static_cast<size_t>(groups * group_words<D>(most) + kGroupSlack) * 4));
    auto* strip = static_cast<uint32_t*>(thread_scratch(
        Scratch::panels, static_cast<size_t>(words_of<D>(most) * kPanelRows * kDenseStrip) * 4));
    auto* lanes = static_cast<float*>(
        thread_scratch(Scratch::sums, static_cast<size_t>(groups * R * kPanelRows) * 4));
    __builtin_memset(lanes, 0, static_cast<size_t>(groups * R * kPanelRows) * 4);

    const auto pack = [&](int64_t k, const auto& row_at) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = rows.begin + g * R;
        pack_row_group<D>(
            [&](int i) -> const T* { return first + i < rows.end ? row_at(first + i) : nullptr; },
            k, packed + g * group_words<D>(k));
      }
    };
    pack(a.hidden, [&](int64_t row) { return dy + token_of(row) * a.dy_stride; });
    rows_times_strips<D>(
        packed, rows.size(), words_of<D>(a.hidden), a.inner, 0, divide_up(a.inner, kPanelRows),
        strip, [&](int64_t panel, int count) { weights.down(expert, panel, count, strip); },
        [&](int64_t first, int64_t live, int64_t column, int64_t columns, const float* sums,
            int64_t stride) {
          for (int64_t i = first; i < first + live; ++i) {
            const int64_t row = rows.begin + i, slot = slot_of(row);
            through_activation<gating>(row, column, columns, sums + (i - first) * stride,
                                       slot < 0 ? 0.f : a.w[slot], lanes + i * kPanelRows);
          }
        });
    finish_slots(expert, rows, lanes);
    if (!a.dx_rows) return;
    pack(2 * a.inner, [&](int64_t row) { return dpre + row * 2 * a.inner; });
    rows_times_strips<D>(
        packed, rows.size(), words_of<D>(2 * a.inner), a.hidden, 0, divide_up(a.hidden, kPanelRows),
        strip, [&](int64_t panel, int count) { weights.gate_up(expert, panel, count, strip); },
        [&](int64_t first, int64_t live, int64_t column, int64_t columns, const float* sums,
            int64_t stride) {
          for (int64_t i = 0; i < live; ++i) {
            float* to = a.dx_rows + (rows.begin + first + i) * a.hidden + column;
            int64_t c = 0;
            for (; c + VL <= columns; c += VL) vstore(to + c, vload(sums + i * stride + c));
            for (; c < columns; ++c) to[c] = sums[i * stride + c];
          }
        });
  }

  void finish_slots(int64_t expert, Span rows, const float* lanes) const {
    for (int64_t row = rows.begin; row < rows.end; ++row, lanes += kPanelRows) {
      const int64_t slot = slot_of(row);
      if (slot < 0) continue;
      if (a.row_of) a.row_of[slot] = static_cast<int32_t>(row);
      if (!a.dw) continue;
      a.dw[slot] = sum_of_lanes(lanes);
      if (a.down_bias)
        a.dw[slot] +=
            dot_bias(dy + token_of(row) * a.dy_stride, a.down_bias + expert * a.down_bias_stride);
    }
  }

  // All rows of all experts; every thread has seen the last of them when it returns.
  void run() const {
    int64_t begin, end;
    my_share(team, a.tokens * a.per_token, 16, &begin, &end);
    for (int64_t s = begin; s < end; ++s) {
      if (a.dw) a.dw[s] = 0.f;
      if (a.row_of) a.row_of[s] = -1;
    }
    team_sync(team);
    dispatch_gating(a.gating, [&](auto gating) {
      ExpertTasks list{a.experts};
      const auto count = [&](int64_t e) { return blocks.count(rows_of(e)); };
      for (int64_t task; list.find(task = next_task(team), count);)
        run_block<decltype(gating)::value>(list.expert,
                                           blocks.block(rows_of(list.expert), task - list.first));
    });
    team_sync(team);
  }

  // dx of tokens: their slots' rows in order, rounded once. A task is a few tokens.
  static constexpr int64_t kTokens = 64;
  int64_t token_tasks() const { return a.dx ? divide_up(a.tokens, kTokens) : 0; }
  void sum_tokens(int64_t task) const {
    for (int64_t t = task * kTokens; t < smaller((task + 1) * kTokens, a.tokens); ++t) {
      T* to = static_cast<T*>(a.dx) + t * a.hidden;
      const int32_t* rows = a.row_of + t * a.per_token;
      int64_t c = 0;
      for (; c + VL <= a.hidden; c += VL) {
        vf sum = vf{};
        for (int64_t j = 0; j < a.per_token; ++j)
          if (rows[j] >= 0) sum = sum + vload(a.dx_rows + rows[j] * a.hidden + c);
        store(to + c, sum);
      }
      for (; c < a.hidden; ++c) {
        float sum = 0.f;
        for (int64_t j = 0; j < a.per_token; ++j)
          if (rows[j] >= 0) sum += a.dx_rows[rows[j] * a.hidden + c];
        store1(to + c, sum);
      }
    }
  }
};

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
