// y[m, n] (+)= A[m, k] @ B[k, n] with B in rows: both gradients of a linear map.
//   of the input:  A = dy [tokens, out], B = W [out, in]; k is long
//   of the weight: A = dy' [out, tokens], given as dy (`transposed`), B = x [tokens, in]; m is long
// K is walked in blocks that the shape decides. All threads pack a block of B together into panels
// of 16 columns; then blocks of rows of A are handed out, packed by the thread that has them, and
// meet the panels in the tiles of linear. Sums are fp32, in ascending K, whatever the threads.
#include "common/scratch.h"
#include "cpu/integers.h"
#include "cpu/matmul_dense.h"
#include "cpu/pack_panel.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int64_t kMostGroups = 8;  // row groups of a task: 96 rows share a strip of B in L1

template <int columns>
struct ElementOf {  // what a word of a panel holds: one of these, or two
  using type = float;
};
template <>
struct ElementOf<2> {
  using type = uint16_t;
};

template <class D>
struct GradientProduct {
  using Element = typename ElementOf<D::columns>::type;
  static constexpr int R = kDenseRows, S = kDenseStrip;
  const GradientProductArgs& a;
  const Team& team;
  const Element *rows, *b;
  int64_t panels, groups, groups_per_task, tasks;

  GradientProduct(const GradientProductArgs& args, const Team& t)
      : a(args),
        team(t),
        rows(static_cast<const Element*>(args.a)),
        b(static_cast<const Element*>(args.b)),
        panels(divide_up(args.n, kPanelRows)),
        groups(divide_up(args.m, R)) {
    groups_per_task = clamped(groups / (2 * team.size), 1, kMostGroups);
    tasks = divide_up(groups, groups_per_task);
  }
  static int64_t words_of(int64_t k) { return divide_up(k, D::columns); }

  // Rows [k0, k0 + k) of B into panels, which the threads share.
  void pack_b(int64_t k0, int64_t k, uint32_t* to) const {
    int64_t begin, end;
    my_share(team, panels, 1, &begin, &end);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t left = a.n - p * kPanelRows;
      const Element* from = b + k0 * a.b_stride + p * kPanelRows;
      uint32_t* panel = to + p * words_of(k) * kPanelRows;
      if constexpr (D::columns == 2)
        pack_columns(from, a.b_stride, smaller(left, kPanelRows), k, panel);
      else
        pack_columns(reinterpret_cast<const uint32_t*>(from), a.b_stride, smaller(left, kPanelRows),
                     k, panel);
    }
  }

  // A group of R rows of A, its columns [k0, k0 + k), as the tiles read them: words of all rows
  // side by side. Rows past the end are zero.
  void pack_group(int64_t group, int64_t k0, int64_t k, uint32_t* to) const {
    const int64_t row = group * R, live = smaller(a.m - row, R);
    if (a.transposed) return pack_group_columns(row, live, k0, k, to);
    int64_t done = 0;
#if defined(__AVX512F__)
    if constexpr (D::steps == 1) {
      // The 16 words stored of each column reach into the next one, which is stored after it.
      constexpr int64_t per_word = D::columns, step = 16 * per_word;
      for (; done + step <= k; done += step) {
        vi r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          r[i] = i < live ? vloadi(rows + (row + i) * a.a_stride + k0 + done) : vi{};
        transpose_16x16(r);
        uint32_t* out = to + done / per_word * R;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) __builtin_memcpy(out + i * R, &r[i], 64);
      }
    }
#endif
    uint32_t* out = to + done / D::columns * D::steps * R;
    for (int64_t i = 0; i < R; ++i) {
      if (i < live)
        prepare_dense<D>(rows + (row + i) * a.a_stride + k0 + done, k - done, out + i, R);
      else
        for (int64_t w = 0; w < words_of(k - done) * D::steps; ++w) out[w * R + i] = 0;
    }
  }

  // The same from columns: A[i, c] lies at a[c * stride + i].
  void pack_group_columns(int64_t row, int64_t live, int64_t k0, int64_t k, uint32_t* to) const {
    int64_t c = 0;
    const bool wide = row + VL <= a.m;
    for (; c < k; c += D::columns, to += R * D::steps) {
      const Element* low = rows + (k0 + c) * a.a_stride + row;
      const bool pair = D::columns == 2 && c + 1 < k;
      if constexpr (VL == 16 && D::steps == 1) {
        if (wide && (D::columns == 1 || pair)) {
          vi word;
          if constexpr (D::columns == 2)
            word = vload_u16(low) | vload_u16(low + a.a_stride) << 16;
          else
            word = vloadi(low);
          __builtin_memcpy(to, &word, 64);
          continue;
        }
      }
      for (int64_t i = 0; i < R; ++i) {
        if constexpr (D::columns == 1) {
          to[i] = i < live ? word_of(low[i]) : 0;
        } else {
          const uint32_t first = i < live ? low[i] : 0;
          const uint32_t second = i < live && pair ? low[a.a_stride + i] : 0;
          if constexpr (D::steps == 1) {
            to[i] = first | second << 16;
          } else {
            to[i] = first << 16;
            to[R + i] = second << 16;
          }
        }
      }
    }
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
    const int64_t words = words_of(k), size = words * D::steps * R;
    const int64_t first = task * groups_per_task, last = smaller(first + groups_per_task, groups);
    // 16 words more: what the last column of a group stores past its end.
    uint32_t* mine = static_cast<uint32_t*>(thread_scratch(
        Scratch::panels, static_cast<size_t>((last - first) * size + 16) * sizeof(uint32_t)));
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
    const int64_t size = panels * kPanelRows * words_of(smaller(a.k_block, a.k));
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
