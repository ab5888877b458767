// The two products of attention for every number of rows (see attention_tile.h).
#include "cpu/attention_tile.h"

#include "cpu/attention_codes.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// How many vectors of K a group of R rows takes at once: enough chains to hide the latency of an
// fma.
template <int R>
constexpr int vectors_at_once() {
  return (VL == 16 ? R <= 6 : R <= 3) ? 4 : 2;
}

template <class E, int R>
static void score_rows(float (*scores)[kTile], const typename E::A* q, const typename E::Word* k,
                       int64_t steps, int64_t positions, const char* ahead) {
  constexpr int C = vectors_at_once<R>();
  constexpr int kPerChunk = kChunk / VL;
  for (int64_t first = 0; first < positions; first += C * VL) {
    const typename E::Word* b = k + first / kChunk * kChunk * steps + first % kChunk;
    for (int64_t begin = 0; begin < steps; begin += kChain<E>) {
      const int64_t n = steps - begin < kChain<E> ? steps - begin : kChain<E>;
      vf acc[R][C];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[r][c] = vset(0.f);
      dot_tile<E::kParts * kMaxRows, kMaxRows, 1, false, C * VL / 16>(
          E{}, acc, q + begin * E::kParts * kMaxRows, b + begin * kChunk, kChunk * steps, kChunk, n,
          ahead ? ahead + (first * steps + begin * C * VL) * 4 : nullptr);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          float* to = scores[r] + first + c * VL;
          vstore(to, begin ? vload(to) + acc[r][c] : acc[r][c]);
        }
    }
  }
  static_assert(C % kPerChunk == 0 || kPerChunk % C == 0);
}

template <class E, int R, int C, bool Masked, int Lines>
FASTLLM_INLINE void value_columns(float* o, int64_t o_stride, const float* alpha,
                                  const typename E::A* p, const Run<typename E::Word>* runs,
                                  int count, int64_t column, int64_t v_stride, const char* ahead) {
  constexpr int kPRow = kTile * E::kParts / E::kPerWord;
  vf acc[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = vset(0.f);
  dot_tile<E::kParts, 1, kPRow, Masked, Lines>(E{}, acc, p, runs[0].words + column, kChunk,
                                               v_stride, runs[0].steps, ahead);
  for (int i = 1; i < count; ++i) {  // a second loop: the common case is one run
    p += runs[i - 1].steps * E::kParts;
    dot_tile<E::kParts, 1, kPRow, Masked, Lines>(E{}, acc, p, runs[i].words + column, kChunk,
                                                 v_stride, runs[i].steps, ahead);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const vf scale = vbroadcast(alpha + r);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* to = o + r * o_stride + c * VL;
      vstore(to, vfma(vload(to), scale, acc[r][c]));
    }
  }
}

// C vectors of V at once. All rows of a group go over V in so many Passes, this is one of them: it
// asks for that part of what is wanted next, from `ahead` on.
template <class E, int R, int C, int Passes>
static void value_pass(float* o, int64_t o_stride, const float* alpha, const typename E::A* p,
                       const Run<typename E::Word>* runs, int count, int64_t v_stride, int64_t dim,
                       const char* ahead) {
  int64_t d = 0;
  const auto columns = [&](auto width, auto masked) __attribute__((always_inline)) {
    constexpr int kLines = (width.value * VL / 16 + Passes - 1) / Passes;
    value_columns<E, R, width.value, masked.value, kLines>(
        o + d, o_stride, alpha, p, runs, count, d, v_stride,
        ahead ? ahead + d * runs[0].steps * 4 / Passes / 64 * 64 : nullptr);
    d += width.value * VL;
  };
  while (d + C * VL <= dim) columns(Constant<C>{}, Constant<0>{});
  if constexpr (C > 4)
    if (d + 4 * VL <= dim) columns(Constant<4>{}, Constant<0>{});
  if constexpr (C > 2)
    if (d + 2 * VL <= dim) columns(Constant<2>{}, Constant<0>{});
  if (d + VL <= dim) columns(Constant<1>{}, Constant<0>{});
  if (d < dim) columns(Constant<1>{}, Constant<1>{});
}

// Memory gives V fastest in ascending order (a third faster than in pieces of 256 bytes), so the few
// rows of a decoded token read whole steps of 128 columns, two rows at a time. What lies in L1 is
// read once instead.
template <class E, int R>
static void value_rows(float* o, int64_t o_stride, const float* alpha, const typename E::A* p,
                       const Run<typename E::Word>* runs, int count, int64_t v_stride, int64_t dim,
                       const char* ahead) {
  constexpr int kWhole = 8, kPRow = kTile * E::kParts / E::kPerWord, kPasses = (R + 1) / 2;
  if constexpr (VL == 16 && R <= 8)
    if (ahead && dim >= kWhole * VL) {
      const int64_t part = dim * runs[0].steps * 4 / kPasses / 64 * 64;
      const auto rows = [&](int r, auto n) {
        value_pass<E, n.value, kWhole, kPasses>(o + r * o_stride, o_stride, alpha + r,
                                                p + r * kPRow, runs, count, v_stride, dim,
                                                ahead + r / 2 * part);
      };
      for (int r = 0; r + 2 <= R; r += 2) rows(r, Constant<2>{});
      if constexpr (R % 2) rows(R - 1, Constant<1>{});
      return;
    }
  value_pass<E, R, vectors_at_once<R>(), 1>(o, o_stride, alpha, p, runs, count, v_stride, dim,
                                            ahead);
}

template <class E>
struct WordKernels {
  template <int R>
  static constexpr RowKernels<typename E::A, typename E::Word> of = {score_rows<E, R>,
                                                                     value_rows<E, R>};
};

template <class K>
FASTLLM_INLINE auto kernels_for(int64_t rows) {
  switch (rows) {
    case 1: return K::template of<1>;
    case 2: return K::template of<2>;
    case 3: return K::template of<3>;
    case 4: return K::template of<4>;
#if defined(__AVX512F__)
    case 5:
    case 6: return K::template of<6>;
    case 7:
    case 8: return K::template of<8>;
#endif
    default: return K::template of<kMaxRows>;
  }
}

}  // namespace

RowKernels<F32::A, F32::Word> row_kernels(F32, int64_t rows) {
  return kernels_for<WordKernels<F32>>(rows);
}
RowKernels<Bf16::A, Bf16::Word> row_kernels(Bf16, int64_t rows) {
  return kernels_for<WordKernels<Bf16>>(rows);
}
#if defined(__AVX512BF16__)
RowKernels<Bf16::A, CodePair> code_kernels(int64_t rows) { return kernels_for<CodeKernels>(rows); }
#endif

}  // namespace fastllm::FASTLLM_ISA
