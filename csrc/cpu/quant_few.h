// Tiles for few rows of x: codes are decoded in registers while one panel of the weight streams by,
// so that reading it is all that takes time. The steps and their order are those of quant_tiles.h.
#pragma once
#include "cpu/matmul_float.h"
#include "cpu/matmul_int8.h"
#include "cpu/quant_unpack.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// A block of UNITS chunks has 8 * UNITS places among its dots, at which its share of the lines that
// will be read `ahead` bytes of codes later is asked for. (None: 26 GB/s of 4-bit codes for one thread
// and row, with: 34. The 16 lines of four chunks in one burst: 8 GB/s of a Zen 4 core, so: 19 to 24.)
template <class C>
FASTLLM_INLINE void prefetch_part(const uint8_t*& soon, int place) {
  constexpr int lines = C::words * 4 * kPanelRows / 64;
  if (place % 8 * lines / 8 == (place % 8 + 1) * lines / 8) return;
  stream_lines<1>(soon);
  soon += 64;
}

template <class F, int MR>
void few_int8(const QuantKernel& q, const Panel& panel, const char* x, int64_t width, float* sums) {
  using C = typename F::Codes;
  using S = typename F::Scales;
  constexpr bool halves = S::integer_scales, flip = C::is_signed && kUnsignedDots;
  constexpr int64_t size = C::words * 4 * kPanelRows, records = halves ? 44 : 40;
  const uint8_t *codes = panel.codes, *scales = panel.scales, *later = scales + q.scales_ahead;
  const vf factor = vset(q.factor);
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = vf{};
  for (int64_t c = 0; c < q.k; c += kBlock, codes += size, x += width * records) {
    const uint8_t* soon = codes + q.codes_ahead;
    stream_lines<1>(later);
    later += q.scale_step;
    vi sum[2][MR][NV];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        sum[0][m][v] = S::has_minimum ? vi{} : splat_word(x + m * records + 36);
        sum[1][m][v] = halves ? splat_word(x + m * records + 40) : vi{};
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        prefetch_part<C>(soon, 2 * i + half);
        vi w[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          w[v] = int8_codes<C>(C::raw(codes, v, i, half));
          if constexpr (flip) w[v] = w[v] ^ static_cast<int32_t>(0x80808080);
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const vi word = splat_word(x + m * records + 16 * half + 4 * i);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            vi& s = sum[halves ? half : 0][m][v];
            s = C::is_signed && !flip ? dot_signed(s, w[v], word) : dot_unsigned(s, w[v], word);
          }
        }
      }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      vf d, minimum = vf{};
      if constexpr (halves) {
        d = S::d_super(scales, c, v);
        const vi low = S::factor(scales, c, v), high = S::factor(scales, c + 16, v);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) sum[0][m][v] = sum[0][m][v] * low + sum[1][m][v] * high;
      } else {
        d = S::d(scales, q.k, c, q.shift, v) * factor;
      }
      if constexpr (S::has_minimum) minimum = S::minimum(scales, q.k, c, q.shift, v);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const char* record = x + m * records;
        acc[m][v] = vfma_once(__builtin_convertvector(sum[0][m][v], vf),
                              d * vbits(splat_word(record + 32)), acc[m][v]);
        if constexpr (S::has_minimum)
          acc[m][v] = vfma_once(minimum, vbits(splat_word(record + 36)), acc[m][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) vstore(sums + m * kPanelRows + v * VL, acc[m][v]);
}

#if defined(__AVX512BF16__)
// Where a tile of pairs stands: codes and scales of a panel, words of x.
struct PairPlace {
  const uint8_t *codes, *later;
  const char* x;
  int64_t column;
};

// UNITS chunks side by side (blocks of two chunks of 16 columns for q6_k): a chain of sums of 128
// columns takes 64 dots of 6 cycles, longer than its codes take to read.
template <class F, int MR, int UNITS>
FASTLLM_INLINE void few_chunks(const QuantKernel& q, const uint8_t* scales, int64_t columns,
                               int64_t stride, PairPlace& at, vf* acc) {
  using C = typename F::Codes;
  using S = typename F::Scales;
  constexpr int64_t size = C::words * 4 * kPanelRows;
  constexpr int parts = S::integer_scales ? 2 : 1;
  const int64_t unit_codes = columns / kBlock * size;
  const int64_t unit_x = (columns / 2 + parts) * stride;
  vf sum[UNITS][parts][MR];
#pragma GCC unroll 8
  for (int u = 0; u < UNITS; ++u)
#pragma GCC unroll 2
    for (int p = 0; p < parts; ++p)
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) sum[u][p][m] = vf{};
  // In ascending order, whatever the order in which the units read.
  const uint8_t *codes = at.codes, *soon = codes + q.codes_ahead;
  const char* x = at.x;
  for (int64_t c = 0; c < columns; c += kBlock, codes += size) {
#pragma GCC unroll 8
    for (int u = 0; u < UNITS; ++u, at.later += q.scale_step) stream_lines<1>(at.later);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      constexpr int words = 8;  // of a half of a block
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
        for (int u = 0; u < UNITS; ++u) {
          prefetch_part<C>(soon, (4 * half + i) * UNITS + u);
          vi w[2];
          decode_pairs<C, MR <= 2>(C::raw(codes + u * unit_codes, 0, i, half), w);
          const char* xu = x + u * unit_x + 2 * i * stride;
#pragma GCC unroll 2
          for (int s = 0; s < 2; ++s)
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m) {
              vf& to = sum[u][parts == 2 ? half : 0][m];
              to = PairDot::dot(to, w[s], splat_word(xu + s * stride + 4 * m));
            }
        }
      x += (words + (parts == 2 ? 1 : 0)) * stride;
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < UNITS; ++u)
#pragma GCC unroll 2
    for (int p = 0; p < parts; ++p) {
      const int64_t column = at.column + u * columns + 16 * p;
      // The word behind a chunk: of a unit of two, the first stands in its middle.
      const char* extra = at.x + u * unit_x + (parts == 2 ? 8 + 9 * p : columns / 2) * stride;
      const vf d = S::d(scales, q.k, column, q.shift, 0);
      vf minimum = vf{};
      if constexpr (S::has_minimum) minimum = S::minimum(scales, q.k, column, q.shift, 0);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const vf e = vbits(splat_word(extra + 4 * m));
        if constexpr (__is_same(C, Float8)) {
          acc[m] = vfma_once(sum[u][p][m], q.sums == Sums::scaled ? d * e : d, acc[m]);
        } else {
          acc[m] = vfma_once(sum[u][p][m], d, acc[m]);
          if constexpr (S::has_minimum) acc[m] = vfma_once(minimum, e, acc[m]);
        }
      }
    }
  at.codes += UNITS * unit_codes;
  at.x += UNITS * unit_x;
  at.column += UNITS * columns;
}

template <class F, int MR>
void few_pairs(const QuantKernel& q, const Panel& panel, const char* x, int64_t width,
               float* sums) {
  using S = typename F::Scales;
  constexpr bool may_be_long = __is_same(S, HalfScales) || __is_same(S, HalfZeros) ||
                               __is_same(S, FloatScales) || __is_same(S, DoubleScales);
  PairPlace at{panel.codes, panel.scales + q.scales_ahead, x, 0};
  vf acc[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) acc[m] = vf{};
  if constexpr (may_be_long) {
    if (const int64_t columns = q.chunk; columns > kBlock) {
      // Codes of 4 bits, one row: 31 to 36 GB/s of a core with 2 side by side, 39 to 43 with 4; of 8
      // bits 35 to 41 with 2, 32 to 38 with 4.
      if constexpr (MR <= 2 && F::Codes::words == 4)
        while (at.column + 4 * columns <= q.k)
          few_chunks<F, MR, 4>(q, panel.scales, columns, width * 4, at, acc);
      while (at.column + 2 * columns <= q.k)
        few_chunks<F, MR, 2>(q, panel.scales, columns, width * 4, at, acc);
      while (at.column < q.k)
        few_chunks<F, MR, 1>(q, panel.scales, q.k - at.column < columns ? q.k - at.column : columns,
                             width * 4, at, acc);
    }
  }
  // Two blocks side by side, GB/s of a Zen 4 core, 1 row: in the cache q4_0 19 -> 23, q4_k 17 -> 22,
  // from memory 18 -> 19, 16 -> 19; four: 19 and 18, q6_k with two 18 -> 16.
  if constexpr (MR <= 2 && !S::integer_scales)
    while (at.column + 2 * kBlock <= q.k)
      few_chunks<F, MR, 2>(q, panel.scales, kBlock, width * 4, at, acc);
  while (at.column < q.k) few_chunks<F, MR, 1>(q, panel.scales, kBlock, width * 4, at, acc);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) vstore(sums + m * kPanelRows, acc[m]);
}
#endif

// Tiles of 1, 2, 4 (and 8) rows.
template <class F>
struct FewTiles {
#if defined(__AVX512F__)
  static constexpr FewTile* int8[] = {few_int8<F, 1>, few_int8<F, 2>, few_int8<F, 4>,
                                      few_int8<F, 8>};
#elif defined(__AVX2__)
  static constexpr FewTile* int8[] = {few_int8<F, 1>, few_int8<F, 2>, few_int8<F, 4>};
#else
  static constexpr FewTile* int8[] = {few_int8<F, 1>, few_int8<F, 2>};
#endif
};
#if defined(__AVX512BF16__)
template <class F>
struct FewPairTiles {
  static constexpr FewTile* all[] = {few_pairs<F, 1>, few_pairs<F, 2>, few_pairs<F, 4>,
                                     few_pairs<F, 8>};
};
#endif

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
