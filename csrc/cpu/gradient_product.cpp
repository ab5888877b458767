// y[m, n] (+)= A[m, k] @ B[k, n] with B in rows: both gradients of a linear map.
//   of the input:  A = dy [tokens, out], B = W [out, in]; k is long
//   of the weight: A = dy' [out, tokens], given as dy (`transposed`), B = x [tokens, in]; m is long
// K is walked in blocks that the shape decides. All threads pack a block of B together into panels
// of 16 columns; then blocks of rows of A are handed out, packed by the thread that has them, and
// meet the panels in the tiles of linear. Sums are fp32, in ascending K, whatever the threads.
#include "common/scratch.h"
#include "cpu/integers.h"
#include "cpu/row_groups.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int64_t kMostGroups = 8;  // row groups of a task: 96 rows share a strip of B in L1

template <class D>
struct GradientProduct {
  using T = Element<D>;
  static constexpr int R = kDenseRows, S = kDenseStrip;
  const GradientProductArgs& a;
  const Team& team;
  const T *rows, *b;
  int64_t panels, groups, groups_per_task, tasks;

  GradientProduct(const GradientProductArgs& args, const Team& t)
      : a(args),
        team(t),
        rows(static_cast<const T*>(args.a)),
        b(static_cast<const T*>(args.b)),
        panels(divide_up(args.n, kPanelRows)),
        groups(divide_up(args.m, R)) {
    groups_per_task = clamped(groups / (2 * team.size), 1, kMostGroups);
    tasks = divide_up(groups, groups_per_task);
  }

  // Rows [k0, k0 + k) of B into panels, which the threads share.
  void pack_b(int64_t k0, int64_t k, uint32_t* to) const {
    int64_t begin, end;
    my_share(team, panels, S, &begin, &end);
    for (int64_t p = begin; p < end; p += S) {
      const T* from = b + k0 * a.b_stride + p * kPanelRows;
      pack_row_strip<D>([&](int64_t c) { return from + c * a.b_stride; }, a.n - p * kPanelRows,
                        static_cast<int>(smaller(S, end - p)), k,
                        to + p * words_of<D>(k) * kPanelRows);
    }
  }

  // A group of R rows of A, its columns [k0, k0 + k).
  void pack_group(int64_t group, int64_t k0, int64_t k, uint32_t* to) const {
    const int64_t row = group * R;
    if (a.transposed) {
      const T* from = rows + k0 * a.a_stride + row;
      return pack_column_group<D>([&](int64_t c) { return from + c * a.a_stride; },
                                  smaller(R, a.m - row), row + VL <= a.m, k, to);
    }
    const T* from = rows + row * a.a_stride + k0;
    pack_row_group<D>([&](int i) { return row + i < a.m ? from + i * a.a_stride : nullptr; }, k,
                      to);
  }

  template <int NP>
  void tile(const uint32_t* panel, const uint32_t* group, int64_t words, int64_t row,
            int64_t column, bool add) const {
    alignas(64) float sums[R * NP * kPanelRows];
    dense_tile<D, R, NP>(panel, words, 0, group, R, sums);
    const int64_t n = smaller(a.n - column, NP * kPanelRows);
    for (int64_t i = 0; i < smaller(R, a.m - row); ++i) {
      const float* from = sums + i * NP * kPanelRows;
      const int64_t at = (row + i) * a.y_stride + column;
      if (a.y_type == DType::bf16)
        put(static_cast<uint16_t*>(a.y) + at, from, n, add);
      else
        put(static_cast<float*>(a.y) + at, from, n, add);
    }
  }
  template <class Y>
  void put(Y* y, const float* from, int64_t n, bool add) const {
    int64_t c = 0;
    for (; c + VL <= n; c += VL)
      store(y + c, add ? load(y + c) + vload(from + c) : vload(from + c));
    for (; c < n; ++c) store1(y + c, add ? load1(y + c) + from[c] : from[c]);
  }

  void run_task(int64_t task, int64_t k0, int64_t k, const uint32_t* packed, bool add) const {
    const int64_t words = words_of<D>(k), size = words * D::steps * R;
    const int64_t first = task * groups_per_task, last = smaller(first + groups_per_task, groups);
    uint32_t* mine = static_cast<uint32_t*>(thread_scratch(
        Scratch::panels,
        static_cast<size_t>((last - first) * size + kGroupSlack) * sizeof(uint32_t)));
    for (int64_t g = first; g < last; ++g) pack_group(g, k0, k, mine + (g - first) * size);
    for (int64_t p = 0; p < panels; p += S) {
      const uint32_t* panel = packed + p * words * kPanelRows;
      for (int64_t g = first; g < last; ++g) {
        const uint32_t* group = mine + (g - first) * size;
        if (p + S <= panels)
          tile<S>(panel, group, words, g * R, p * kPanelRows, add);
        else
          tile<1>(panel, group, words, g * R, p * kPanelRows, add);
      }
    }
  }

  void run() const {
    // Two blocks of B in turn: who packs the next one overwrites none that a slower thread reads,
    // because all have met since that one was done.
    const int64_t size = panels * kPanelRows * words_of<D>(smaller(a.k_block, a.k));
    int64_t task = next_task(team), done = 0;  // tasks are numbered through the blocks of K
    for (int64_t k0 = 0; k0 < a.k; k0 += a.k_block, done += tasks) {
      const int64_t k = smaller(a.k_block, a.k - k0);
      uint32_t* packed = static_cast<uint32_t*>(a.scratch) + k0 / a.k_block % 2 * size;
      pack_b(k0, k, packed);
      team_sync(team);
      for (; task < done + tasks; task = next_task(team))
        run_task(task - done, k0, k, packed, a.add || k0 > 0);
    }
  }
};

}  // namespace

void gradient_product(const GradientProductArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    GradientProduct<Bf16Dense>(a, team).run();
  else
    GradientProduct<Float32>(a, team).run();
}

// y[c] (+)= the sum of x[r, c] over rows, ascending.
void column_sums(const ColumnSumsArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, a.columns, 64, &begin, &end);
  if (!a.add)
    for (int64_t c = begin; c < end; ++c) a.y[c] = 0.f;
  dispatch_float(a.type, [&](auto t) {
    const auto* x = static_cast<const decltype(t)*>(a.x);
    for (int64_t r = 0; r < a.rows; ++r, x += a.stride) {
      int64_t c = begin;
      for (; c + VL <= end; c += VL) vstore(a.y + c, vload(a.y + c) + load(x + c));
      for (; c < end; ++c) a.y[c] += load1(x + c);
    }
  });
}

}  // namespace fastllm::FASTLLM_ISA
