// y = x @ W.T + bias for packed weights. Rows of x are brought into the form that the tiles read (by every
// thread for itself if they are few, else once by all), then strips of outputs are handed out.
#include "cpu/matmul_int8.h"
#include "cpu/matmul_tasks.h"
#include "ops.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kStrip = 2;
#elif defined(__AVX2__)
constexpr int kRows = 2, kStrip = 1;
#else
constexpr int kRows = 1, kStrip = 1;
#endif

template <class F>
struct Int8Product {
  static constexpr int rows = kRows;
  static int64_t row_bytes(int64_t k) { return k / kBlock * static_cast<int64_t>(sizeof(Int8Block)); }

  static void prepare(const QuantMatmulArgs& a, const RowGroups& to, int64_t row) {
    Int8Block* out = reinterpret_cast<Int8Block*>(to.group(row / to.width)) + row % to.width;
    if (row >= a.m) {
      for (int64_t b = 0; b < a.k / kBlock; ++b) __builtin_memset(out + b * to.width, 0, sizeof *out);
      return;
    }
    if (a.x_type == DType::bf16)
      quantize_row<F>(static_cast<const uint16_t*>(a.x) + row * a.x_stride, a.k, out, to.width);
    else
      quantize_row<F>(static_cast<const float*>(a.x) + row * a.x_stride, a.k, out, to.width);
  }
  template <int MR, int NP>
  static void tile(const QuantMatmulArgs& a, int64_t panel, const char* x, int64_t width, float* out) {
    const int64_t blocks = a.k / kBlock;
    int8_tile<F, MR, NP>(static_cast<const uint8_t*>(a.data) + panel * blocks * block_bytes<F>,
                         a.scales + panel * blocks * block_scales<F>, blocks,
                         reinterpret_cast<const Int8Block*>(x), width, out);
  }
};

template <class P, int MR, int NP>
void tile_and_store(const QuantMatmulArgs& a, int64_t panel, const RowGroups& x, int64_t group,
                    int64_t live) {
  alignas(64) float sums[MR * NP * kPanelRows];
  P::template tile<MR, NP>(a, panel, x.group(group), x.width, sums);
  store_tile(a.out, sums, NP * kPanelRows, group * x.width, live, panel * kPanelRows);
}

template <class P, int NP>
void strip_times_group(const QuantMatmulArgs& a, int64_t panel, const RowGroups& x, int64_t group) {
  const int64_t left = x.rows - group * x.width;
  const int64_t live = left < x.width ? left : x.width;
  const int size = tile_rows(live, P::rows);
  if constexpr (P::rows >= 12)
    if (size == 12) return tile_and_store<P, 12, NP>(a, panel, x, group, live);
  if constexpr (P::rows >= 6)
    if (size == 6) return tile_and_store<P, 6, NP>(a, panel, x, group, live);
  if constexpr (P::rows >= 4)
    if (size == 4) return tile_and_store<P, 4, NP>(a, panel, x, group, live);
  if constexpr (P::rows >= 2)
    if (size == 2) return tile_and_store<P, 2, NP>(a, panel, x, group, live);
  tile_and_store<P, 1, NP>(a, panel, x, group, live);
}

template <class P>
void prepare_rows(const QuantMatmulArgs& a, const Team& team, RowGroups* x) {
  const int64_t padded = x->groups() * x->width;
  if (!a.scratch) {
    x->base = static_cast<char*>(thread_scratch(Scratch::rows, padded * x->row_bytes));
    for (int64_t row = 0; row < padded; ++row) P::prepare(a, *x, row);
    return;
  }
  x->base = static_cast<char*>(a.scratch);
  int64_t begin, end;
  my_share(team, padded, x->width, &begin, &end);
  for (int64_t row = begin; row < end; ++row) P::prepare(a, *x, row);
  team_sync(team);
}

template <class P>
void product(const QuantMatmulArgs& a, const Team& team) {
  RowGroups x{a.m, tile_rows(a.m, P::rows), P::row_bytes(a.k), nullptr};
  prepare_rows<P>(a, team, &x);
  const Tasks tasks = make_tasks(x, a.out.n, kStrip, team);
  const int64_t panels = (a.out.n + kPanelRows - 1) / kPanelRows;
  for (int64_t t; (t = next_task(team)) < tasks.count();) {
    const int64_t block = t / tasks.runs, run = t % tasks.runs;
    const int64_t first = block * tasks.groups_per_block;
    const int64_t last = first + tasks.groups_per_block < x.groups() ? first + tasks.groups_per_block : x.groups();
    const int64_t end = (run + 1) * tasks.run < tasks.strips ? (run + 1) * tasks.run : tasks.strips;
    for (int64_t strip = run * tasks.run; strip < end; ++strip) {
      const int64_t panel = strip * kStrip;
      for (int64_t group = first; group < last; ++group) {
        if (panel + kStrip <= panels)
          strip_times_group<P, kStrip>(a, panel, x, group);
        else
          strip_times_group<P, 1>(a, panel, x, group);
      }
    }
  }
}

}  // namespace

void quant_matmul(const QuantMatmulArgs& a, const Team& team) {
  switch (a.format) {
    case Format::q4_0: return product<Int8Product<Q4_0>>(a, team);
    case Format::q4_1: return product<Int8Product<Q4_1>>(a, team);
    case Format::q8_0: return product<Int8Product<Q8_0>>(a, team);
    default: return;
  }
}

}  // namespace fastllm::FASTLLM_ISA
