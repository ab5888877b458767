// The two products of a layer of experts and the sum of a token's experts. Rows are gathered where
// they are packed for the tiles, so no sorted copy of x is made; the first product's tiles end in
// the activation, the second's in fp32 rows that a last pass adds up token by token, in slot order.
#pragma once
#include "cpu/gated_activation.h"
#include "cpu/moe_weights.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Calls body(constant) with the smallest tile that holds `live` of the rows of a W.
template <int rows>
struct TileRows {
  static constexpr int value = rows;
};
template <class W, int NP, class Body>
FASTLLM_INLINE void dispatch_rows(int64_t live, const Body& body) {
  if (live <= 1) return body(TileRows<1>{});
  if constexpr (W::rows >= 2)
    if (live <= 2) return body(TileRows<2>{});
  if constexpr (W::rows >= 4)
    if (live <= 4) return body(TileRows<4>{});
  if constexpr (W::rows >= 6)
    if (live <= 6) return body(TileRows<6>{});
  if constexpr (W::few >= 8 && NP == 1)
    if (live <= 8) return body(TileRows<8>{});
  if constexpr (W::rows >= 12) body(TileRows<12>{});
}

// The rows of a task, packed for the tiles; the next task of the same block finds them there.
struct PackedRows {
  Span rows{-1, -1};
  int64_t group_bytes = 0;
  const char* base = nullptr;
};
template <class W, class Row>
void pack_rows(const W& w, const MoeTask& task, const Row& row, PackedRows* packed) {
  const Span rows = task.rows;
  if (packed->rows.begin == rows.begin && packed->rows.end == rows.end) return;
  const int64_t width = task.width, groups = divide_up(rows.size(), width);
  packed->group_bytes = width * w.row_bytes();
  char* to = static_cast<char*>(thread_scratch(
      Scratch::rows, static_cast<size_t>(groups * packed->group_bytes + kGroupSlack * 4)));
  packed->base = to;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = rows.begin + g * width;
    w.pack_group([&](int64_t i) { return first + i < rows.end ? row(first + i) : nullptr; }, width,
                 to + g * packed->group_bytes);
  }
  packed->rows = rows;
}

// A group of rows times NP panels of every side; done gets the sums of each.
template <int SIDES, int NP, class W, class Done>
FASTLLM_INLINE void strip_times_group(const W& w, const int64_t* outputs, const char* x,
                                      int64_t width, int64_t live, int64_t left, const Done& done) {
  dispatch_rows<W, NP>(live, [&](auto size) {
    constexpr int MR = decltype(size)::value;
    alignas(64) float sums[SIDES][MR * NP * kPanelRows];
    for (int side = 0; side < SIDES; ++side)
      w.template tile<MR, NP>(side, outputs[side], x, width, left, sums[side]);
    done(sums[0], sums[SIDES - 1], NP * kPanelRows);
  });
}

// All strips of a task for a weight whose strips meet all of its rows at once.
template <int SIDES, class W, class Done>
void run_strips(const W& w, const MoeTask& task, int64_t n, const PackedRows& x, const Done& done) {
  for (int64_t panel = task.panel; panel < task.end; panel += task.wide)
    w.template multiply<SIDES>(
        panel, n, panel + task.wide < task.end, task, x.base,
        [&](int64_t row, int64_t live, const float* one, const float* two, int64_t stride) {
          done(task.rows.begin + row, live, panel * kPanelRows, one, two, stride);
        });
}

// All strips of a task for its packed rows. Side s has the outputs [s * n, s * n + n) of the weight;
// done(row, live, column, sums of the first and of the last side, stride) gets every tile.
template <int SIDES, class W, class Done>
void run_tiles(W& w, const MoeTask& task, int64_t n, const PackedRows& x, const Done& done) {
  for (int64_t panel = task.panel; panel < task.end; panel += task.wide) {
    const int64_t column = panel * kPanelRows;
    const bool whole = task.wide == W::strip && panel + task.wide <= task.end;
    const int64_t count = whole ? W::strip : 1;
    const int64_t left = task.end - panel - count;
    int64_t outputs[SIDES];
    for (int side = 0; side < SIDES; ++side) {
      outputs[side] = side * n + column;
      w.begin_strip(side, outputs[side], count, side * n + n, left > 0);
    }
    for (int64_t row = task.rows.begin; row < task.rows.end; row += task.width) {
      const char* group = x.base + (row - task.rows.begin) / task.width * x.group_bytes;
      const int64_t live = smaller(task.rows.end - row, task.width);
      const bool first = row == task.rows.begin;
      const auto finish = [&](const float* one, const float* two, int64_t stride) {
        done(row, live, column, one, two, stride);
      };
      if (whole)
        strip_times_group<SIDES, W::strip>(w, outputs, group, task.width, live, first ? left : 0,
                                           finish);
      else
        strip_times_group<SIDES, 1>(w, outputs, group, task.width, live, first ? left : 0, finish);
    }
  }
}

template <int SIDES, class W, class Done>
FASTLLM_INLINE void run_task(W& w, const MoeTask& task, int64_t n, const PackedRows& x,
                             const Done& done) {
  if constexpr (W::by_strips)
    run_strips<SIDES>(w, task, n, x, done);
  else
    run_tiles<SIDES>(w, task, n, x, done);
}

FASTLLM_INLINE vf load_bias(const void* bias, DType type, int64_t at, int64_t n) {
  if (type == DType::bf16) {
    const auto* from = static_cast<const uint16_t*>(bias) + at;
    return n >= VL ? load(from) : load_n(from, n);
  }
  const auto* from = static_cast<const float*>(bias) + at;
  return n >= VL ? load(from) : load_n(from, n);
}
template <class T>
FASTLLM_INLINE void store_columns(T* p, vf v, int64_t n) {
  if (n >= VL)
    store(p, v);
  else
    store_n(p, v, n);
}
FASTLLM_INLINE vf rounded(vf v, const uint16_t*) { return vround_bf16(v); }
FASTLLM_INLINE vf rounded(vf v, const float*) { return v; }

// What a layer's kernels share: its arguments and the parts of its scratch.
struct MoeLayer {
  const MoeArgs& a;
  const MoeScratch parts;
  explicit MoeLayer(const MoeArgs& args)
      : a(args), parts(moe_scratch_parts(args.tokens, args.hidden, args.count(), args.inner)) {}

  float* rows() const { return reinterpret_cast<float*>(a.scratch + parts.rows); }
  char* activated() const { return a.scratch + parts.activated; }
  int32_t* row_of() const { return reinterpret_cast<int32_t*>(a.scratch + parts.row_of); }
  int64_t element() const { return a.type == DType::bf16 ? 2 : 4; }
  // The slot of a row, or -1 if it is none: whatever the tensor holds, nothing else is touched.
  int64_t slot(int64_t row) const {
    const int64_t slot = a.slots[row];
    return slot >= 0 && slot < a.count() ? slot : -1;
  }
};

// pre = round(sums + bias), a = round(act(gate, up)) for `live` rows of a tile.
template <class T, Gating gating>
__attribute__((noinline)) void activate_tile(const MoeLayer& l, int64_t expert, int64_t row,
                                             int64_t live, int64_t column, const float* gate,
                                             const float* up, int64_t stride) {
  const MoeArgs& a = l.a;
  const int64_t n = smaller(a.inner - column, stride);
  T* pre = static_cast<T*>(a.pre);
  T* out = reinterpret_cast<T*>(l.activated());
  for (int64_t m = 0; m < live; ++m, gate += stride, up += stride)
    for (int64_t c = 0; c < n; c += VL) {
      vf g = vload(gate + c), u = vload(up + c);
      const int64_t left = n - c, at = column + c;
      if (a.gate_up_bias) {
        const int64_t first = expert * 2 * a.inner + at;
        g = g + load_bias(a.gate_up_bias, a.gate_up_bias_type, first, left);
        u = u + load_bias(a.gate_up_bias, a.gate_up_bias_type, first + a.inner, left);
      }
      g = rounded(g, out);
      u = rounded(u, out);
      if (pre) {
        T* to = pre + (row + m) * 2 * a.inner + at;
        store_columns(to, g, left);
        store_columns(to + a.inner, u, left);
      }
      store_columns(out + (row + m) * a.inner + at, gated<gating>(g, u), left);
    }
}

// The first product: x gathered, times gate and up, activated. `row(slot)` points to what is packed
// of a slot's token. The beginning of the first weight is asked for before prepare(), which makes
// rows that all threads read.
template <class W, class Row, class Prepare>
void first_product(const MoeLayer& l, W& w, const Row& row, const Team& team,
                   const Prepare& prepare) {
  const MoeArgs& a = l.a;
  MoeTasks<W> list(w, a, a.inner, 0, team);
  PackedRows packed;
  const auto source = [&](int64_t at) {
    const int64_t slot = l.slot(at);
    return slot < 0 ? nullptr : row(slot / a.per_token);
  };
  const auto begin = [&](const MoeTask& task) {
    for (int64_t side = 0; side < 2; ++side)
      w.prefetch(task.expert, side * a.inner + task.panel * kPanelRows, (side + 1) * a.inner);
  };
  MoeTask task;
  const bool more = list.next(&task);
  if (more && list.streams()) begin(task);
  prepare();
  run_moe_tasks(list, task, more, begin, [&](const MoeTask& t) {
    w.begin_expert(t.expert, t.few);
    pack_rows(w, t, source, &packed);
    run_task<2>(w, t, a.inner, packed,
                [&](int64_t at, int64_t live, int64_t column, const float* gate, const float* up,
                    int64_t stride) {
                  dispatch_float(a.type, [&](auto type) {
                    dispatch_gating(a.gating, [&](auto gating) {
                      activate_tile<decltype(type), decltype(gating)::value>(
                          l, t.expert, at, live, column, gate, up, stride);
                    });
                  });
                });
  });
}

// o = sums + bias, fp32, for `live` rows of a tile.
__attribute__((noinline, unused)) static void store_outputs(const MoeLayer& l, int64_t expert,
                                                            int64_t row, int64_t live,
                                                            int64_t column, const float* sums,
                                                            int64_t stride) {
  const MoeArgs& a = l.a;
  const int64_t n = smaller(a.hidden - column, stride);
  float* out = l.rows() + row * a.hidden + column;
  for (int64_t m = 0; m < live; ++m, sums += stride, out += a.hidden)
    for (int64_t c = 0; c < n; c += VL) {
      vf v = vload(sums + c);
      if (a.down_bias)
        v = v + load_bias(a.down_bias, a.down_bias_type, expert * a.hidden + column + c, n - c);
      store_columns(out + c, v, n - c);
    }
}

// The second product. Its first task is asked for before the threads meet at the end of the first
// product: by then, the beginning of its weight is on the way.
template <class W>
void second_product(const MoeLayer& l, W& w, const Team& team) {
  const MoeArgs& a = l.a;
  MoeTasks<W> list(w, a, a.hidden, 1, team);
  PackedRows packed;
  const char* activated = l.activated();
  const int64_t row_bytes = a.inner * l.element();
  const auto source = [&](int64_t at) { return activated + at * row_bytes; };
  const auto begin = [&](const MoeTask& task) {
    w.prefetch(task.expert, task.panel * kPanelRows, a.hidden);
  };
  MoeTask task;
  const bool more = list.next(&task);
  if (more && list.streams()) begin(task);
  team_sync(team);
  run_moe_tasks(list, task, more, begin, [&](const MoeTask& t) {
    w.begin_expert(t.expert, t.few);
    pack_rows(w, t, source, &packed);
    run_task<1>(
        w, t, a.hidden, packed,
        [&](int64_t at, int64_t live, int64_t column, const float* sums, const float*,
            int64_t stride) { store_outputs(l, t.expert, at, live, column, sums, stride); });
  });
}

// row_of[slot] = the row of the slot, or -1. Threads meet between the two steps anyway.
FASTLLM_INLINE void clear_row_of(const MoeLayer& l, const Team& team) {
  int64_t begin, end;
  my_share(team, l.a.count(), 16, &begin, &end);
  for (int64_t s = begin; s < end; ++s) l.row_of()[s] = -1;
}
FASTLLM_INLINE void fill_row_of(const MoeLayer& l, const Team& team) {
  int64_t first = 0, last = 0, begin, end;
  if (l.a.experts) {
    first = expert_span(l.a.offsets, 0, l.a.count()).begin;
    last = expert_span(l.a.offsets, l.a.experts - 1, l.a.count()).end;
  }
  my_share(team, last - first, 16, &begin, &end);
  for (int64_t row = first + begin; row < first + end; ++row)
    if (const int64_t slot = l.slot(row); slot >= 0) l.row_of()[slot] = static_cast<int32_t>(row);
}

// N vectors of a token's columns [column, column + n): products are rounded, then added.
template <int N, class Y>
FASTLLM_INLINE void combine_columns(const MoeLayer& l, int64_t token, int64_t column, int64_t n) {
  const MoeArgs& a = l.a;
  vf acc[N];
  for (int v = 0; v < N; ++v) acc[v] = vf{};
  for (int64_t j = 0; j < a.per_token; ++j) {
    const int64_t slot = token * a.per_token + j, row = l.row_of()[slot];
    if (row < 0) continue;
    const vf weight = vset(a.weights[slot]);
    const float* from = l.rows() + row * a.hidden + column;
    for (int v = 0; v < N; ++v)
      acc[v] = acc[v] + weight * (n >= N * VL ? vload(from + v * VL) : load_n(from, n));
  }
  Y* y = static_cast<Y*>(a.y) + token * a.hidden + column;
  for (int v = 0; v < N; ++v) {
    if (a.base)
      acc[v] = acc[v] +
               load_bias(a.base, a.base_type, token * a.base_stride + column + v * VL, n - v * VL);
    store_columns(y + v * VL, acc[v], n - v * VL);
  }
}

// y = round(sum of weight * o over the slots in order + base).
template <class Y>
void combine(const MoeLayer& l, const Team& team) {
  constexpr int64_t kColumns = 256, kWide = 4;
  const MoeArgs& a = l.a;
  const int64_t runs = divide_up(a.hidden, kColumns);
  int64_t begin, end;
  my_share(team, a.tokens * runs, 1, &begin, &end);
  for (int64_t i = begin; i < end; ++i) {
    int64_t column = i % runs * kColumns;
    const int64_t token = i / runs, last = smaller(column + kColumns, a.hidden);
    for (; column + kWide * VL <= last; column += kWide * VL)
      combine_columns<kWide, Y>(l, token, column, last - column);
    for (; column < last; column += VL) combine_columns<1, Y>(l, token, column, last - column);
  }
}

FASTLLM_INLINE void combine_experts(const MoeLayer& l, const Team& team) {
  if (l.a.y_type == DType::bf16)
    combine<uint16_t>(l, team);
  else
    combine<float>(l, team);
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
