// What all products share: how rows of x are grouped, how outputs are cut into tasks, how a tile of
// fp32 sums becomes y. None of it touches the order of summation, so none of it changes a bit of
// the result.
#pragma once
#include "common/scratch.h"
#include "cpu/packed.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {

// Rows of a tile that kernels are compiled for, the smallest that holds `rows`. Up to P::few rows
// are one tile of one panel; more are cut into tiles of P::rows and P::strip panels.
template <class P>
FASTLLM_INLINE int tile_rows(int64_t rows) {
  if (P::few >= 8 && rows > 6 && rows <= 8) return 8;
  const int fit = rows <= 1 ? 1 : rows <= 2 ? 2 : rows <= 4 ? 4 : rows <= 6 ? 6 : 12;
  return fit < P::rows ? fit : P::rows;
}

// Prepared rows lie in groups of `width`, interleaved, so that a tile walks one pointer; the last
// group is padded with zeros to a whole tile.
struct RowGroups {
  int64_t rows, width, row_bytes;
  char* base;
  int64_t groups() const { return (rows + width - 1) / width; }
  int64_t group_bytes() const { return width * row_bytes; }
  char* group(int64_t g) const { return base + g * group_bytes(); }
};

// Columns of y are cut into strips of kStrip panels, rows into blocks that stay in the L2 cache; a
// task is a run of strips of one block. Rows vary slowest, so a block of x is reused by consecutive
// tasks.
struct Tasks {
  int64_t strips, run, runs, groups_per_block, blocks;
  int64_t count() const { return runs * blocks; }
};
constexpr int64_t kRowBlockBytes = 512 << 10;
// Blocks of rows are made until there are as many tasks as the first; strips are handed out in as
// many runs as the second, since a run of one strip costs nothing and threads should end together.
constexpr int64_t kTasksPerThread = 8, kRunsPerThread = 64;

FASTLLM_INLINE Tasks make_tasks(const RowGroups& rows, int64_t n, int strip_panels,
                                int64_t block_bytes, const Team& team) {
  const int64_t columns = static_cast<int64_t>(strip_panels) * kPanelRows;
  Tasks t;
  t.strips = (n + columns - 1) / columns;
  const int64_t groups = rows.groups();
  int64_t fit = block_bytes / (rows.group_bytes() + 1);
  if (fit < 1) fit = 1;
  t.blocks = (groups + fit - 1) / fit;
  const int64_t wanted = kTasksPerThread * team.size;
  while (t.blocks * t.strips < wanted && t.blocks < groups) ++t.blocks;
  t.groups_per_block = t.blocks ? (groups + t.blocks - 1) / t.blocks : 1;
  if (t.groups_per_block > 0) t.blocks = (groups + t.groups_per_block - 1) / t.groups_per_block;
  t.run = t.strips * t.blocks / (kRunsPerThread * team.size);
  if (t.run < 1) t.run = 1;
  if (t.run > t.strips) t.run = t.strips;
  t.runs = t.run ? (t.strips + t.run - 1) / t.run : 0;
  return t;
}

template <class Y>
FASTLLM_INLINE void store_row(Y* y, const float* sums, const MatmulOutput& o, int64_t column,
                              int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) {
    vf v = vload(sums + c);
    if (o.bias && o.bias_type == DType::bf16)
      v = v + load(static_cast<const uint16_t*>(o.bias) + column + c);
    if (o.bias && o.bias_type == DType::f32)
      v = v + load(static_cast<const float*>(o.bias) + column + c);
    store(y + c, v);
  }
  for (; c < n; ++c) {
    float v = sums[c];
    if (o.bias && o.bias_type == DType::bf16)
      v = v + load1(static_cast<const uint16_t*>(o.bias) + column + c);
    if (o.bias && o.bias_type == DType::f32)
      v = v + load1(static_cast<const float*>(o.bias) + column + c);
    store1(y + c, v);
  }
}

// sums[c] = base[c] + scale * sums[c], the product rounded before the sum.
FASTLLM_INLINE void add_to_base(float* sums, const float* base, float scale, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) vstore(sums + c, vload(base + c) + vset(scale) * vload(sums + c));
  for (; c < n; ++c) sums[c] = base[c] + scale * sums[c];
}

// Adds the bias and rounds `rows` rows of a tile whose sums lie `stride` apart into y at (row,
// column).
FASTLLM_INLINE void store_tile(const MatmulOutput& o, float* sums, int64_t stride, int64_t row,
                               int64_t rows, int64_t column) {
  const int64_t n = o.n - column < stride ? o.n - column : stride;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t at = (row + m) * o.y_stride + column;
    if (o.base)
      add_to_base(sums + m * stride, o.base + (row + m) * o.base_stride + column, o.scale, n);
    if (o.y_type == DType::bf16)
      store_row(static_cast<uint16_t*>(o.y) + at, sums + m * stride, o, column, n);
    else
      store_row(static_cast<float*>(o.y) + at, sums + m * stride, o, column, n);
  }
}

// A product P knows its operands: row_bytes(), prepare(groups, row), begin_strip(panel, panels) and
// tile<MR, NP>(panel, x, width, first, sums), where `first` says
// that this is the strip's first tile; P::rows and P::strip are its largest tile.
template <class P, int MR, int NP>
FASTLLM_INLINE void tile_and_store(const P& p, const MatmulOutput& o, int64_t panel,
                                   const RowGroups& x, int64_t group, int64_t live, bool first) {
  alignas(64) float sums[MR * NP * kPanelRows];
  p.template tile<MR, NP>(panel, x.group(group), x.width, first, sums);
  store_tile(o, sums, NP * kPanelRows, group * x.width, live, panel * kPanelRows);
}

template <class P, int NP>
static void strip_times_group(const P& p, const MatmulOutput& o, int64_t panel, const RowGroups& x,
                              int64_t group, bool first) {
  const int64_t left = x.rows - group * x.width;
  const int64_t live = left < x.width ? left : x.width;
  const int size = tile_rows<P>(live);
  if constexpr (P::rows >= 12)
    if (size == 12) return tile_and_store<P, 12, NP>(p, o, panel, x, group, live, first);
  if constexpr (P::few >= 8)
    if (size == 8) return tile_and_store<P, 8, NP>(p, o, panel, x, group, live, first);
  if constexpr (P::rows >= 6)
    if (size == 6) return tile_and_store<P, 6, NP>(p, o, panel, x, group, live, first);
  if constexpr (P::rows >= 4)
    if (size == 4) return tile_and_store<P, 4, NP>(p, o, panel, x, group, live, first);
  if constexpr (P::rows >= 2)
    if (size == 2) return tile_and_store<P, 2, NP>(p, o, panel, x, group, live, first);
  tile_and_store<P, 1, NP>(p, o, panel, x, group, live, first);
}

// Few rows: every thread prepares its own copy. Many: all threads prepare one together, in
// `shared`.
template <class P>
static RowGroups prepare_rows(const P& p, int64_t rows, void* shared, const Team& team) {
  RowGroups x{rows, tile_rows<P>(rows), p.row_bytes(), static_cast<char*>(shared)};
  const int64_t padded = x.groups() * x.width;
  if (!shared) {
    x.base = static_cast<char*>(thread_scratch(Scratch::rows, padded * x.row_bytes));
    for (int64_t row = 0; row < padded; ++row) p.prepare(x, row);
    return x;
  }
  int64_t begin, end;
  my_share(team, padded, x.width, &begin, &end);
  for (int64_t row = begin; row < end; ++row) p.prepare(x, row);
  team_sync(team);
  return x;
}

// Strips [strip, end) times groups [first, last) of rows.
template <class P>
static void strips_times_groups(const P& p, const MatmulOutput& o, const RowGroups& x, int wide,
                                int64_t strip, int64_t end, int64_t first, int64_t last) {
  const int64_t panels = (o.n + kPanelRows - 1) / kPanelRows;
  for (; strip < end; ++strip) {
    const int64_t panel = strip * wide;
    const bool whole = wide == P::strip && panel + wide <= panels;
    p.begin_strip(panel, whole ? P::strip : 1);
    for (int64_t group = first; group < last; ++group) {
      if (whole)
        strip_times_group<P, P::strip>(p, o, panel, x, group, group == first);
      else
        strip_times_group<P, 1>(p, o, panel, x, group, group == first);
    }
  }
}

template <class P>
static void product(const P& p, const MatmulOutput& o, int64_t rows, void* shared,
                    const Team& team) {
  if (rows <= P::few) {
    // Bound by reading the weight: every thread streams one range of it, one panel at a time, and
    // asks for the beginning before it prepares its rows. Strips handed out one by one would have
    // each thread prefetch what another one is going to read: that cost a SmolLM2 step of 8 rows
    // 4.2 ms against 2.8 on two cores, a step of one row 2.3 ms against 1.9.
    int64_t begin, end;
    my_share(team, (o.n + kPanelRows - 1) / kPanelRows, 1, &begin, &end);
    if (begin < end) p.prefetch_panel(begin);
    const RowGroups x = prepare_rows(p, rows, shared, team);
    return strips_times_groups(p, o, x, 1, begin, end, 0, x.groups());
  }
  const RowGroups x = prepare_rows(p, rows, shared, team);
  const Tasks tasks = make_tasks(x, o.n, P::strip, P::row_block, team);
  for (int64_t t; (t = next_task(team)) < tasks.count();) {
    const int64_t first = t / tasks.runs * tasks.groups_per_block, run = t % tasks.runs;
    const int64_t last =
        first + tasks.groups_per_block < x.groups() ? first + tasks.groups_per_block : x.groups();
    const int64_t end = (run + 1) * tasks.run < tasks.strips ? (run + 1) * tasks.run : tasks.strips;
    strips_times_groups(p, o, x, P::strip, run * tasks.run, end, first, last);
  }
}

}  // namespace fastllm::FASTLLM_ISA
