// The tiles of quantized products over a segment in canonical form.
//
// Cost on AVX-512 with two multiplier ports (Zen 5: 8.3 G/s of vpdpbusd, vdpbf16ps, FMA and mulps
// together; conversions, vpmulld and integer sums run beside them): int8 has 8 dots a block of 32,
// row and panel, the product of two scales and an FMA, one more with a minimum: 8/10 or 8/11 of 1,070
// GOP/s. bf16 has 16 dots for 32 columns and one or two FMAs a chunk: 16/17 (q4_0), 16/18 (q4_1,
// q6_k), 64/65 (chunks of 128) of 535 GFLOP/s. 24 accumulators cover the latency of a dot (6 cycles)
// four times; fp32 sums of more than 14 outputs stay in the L1 cache, where an FMA reads them.
#pragma once
#include "cpu/matmul_float.h"
#include "cpu/matmul_int8.h"
#include "cpu/quant_kernels.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// The fp32 sums of a segment are kept in registers if they fit beside a chunk's, of which an output
// has PARTS.
#if defined(__AVX512F__)
constexpr int kRegisterSums = 28;
#else
constexpr int kRegisterSums = 8;
#endif

template <int MR, int V, int PARTS = 1>
struct TileSums {
  static constexpr bool kept = MR * V * (PARTS + 1) <= kRegisterSums;
  float* at;
  vf acc[kept ? MR : 1][kept ? V : 1];
  FASTLLM_INLINE TileSums begin(float* at, bool zeros) {
    TileSums s;
    s.at = at;
    if (zeros) __builtin_memset(at, 0, MR * V * VL * sizeof(float));
    if constexpr (kept)
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) s.acc[m][v] = vload(at + (m * V + v) * VL);
    return s;
  }
  __attribute__((always_inline)) vf get(int m, int v) const {
    if constexpr (kept) return acc[m][v];
    return vload(at + (m * V + v) * VL);
  }
  __attribute__((always_inline)) void set(int m, int v, vf x) {
    if constexpr (kept)
      acc[m][v] = x;
    else
      vstore(at + (m * V + v) * VL, x);
  }
  // Without this GCC moves sums that stay in memory to the stack and back.
  __attribute__((always_inline)) void stay() const {
    if constexpr (!kept) asm volatile("" ::: "memory");
  }
  __attribute__((always_inline)) void end() {
    if constexpr (kept)
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) vstore(at + (m * V + v) * VL, acc[m][v]);
  }
};

FASTLLM_INLINE vf splat_float(const char* p) { return vbits(splat_word(p)); }

constexpr int kSteps = 8;  // 16 columns of pairs, which divide every chunk

// How far ahead a wide tile of floats asks for x, which comes from the L2 or the L3 cache: 2 to 4% of
// a product on Zen 4. Asking for codes too, which come from L2, or for x of int8 products, which has
// half as many bytes, wins nothing there.
constexpr int64_t kRowsAhead = 768;

template <class Dot, int MR, int NP>
void float_tile(const Segment& s, const char* x, int64_t width, float* sums) {
  constexpr int V = NP * NV;
  auto total = TileSums<MR, V>::begin(sums, s.first);
  const uint8_t* codes = s.codes;
  const float* scales = s.scales;
  const int64_t stride = width * 4;
  for (int64_t column = 0; column < s.columns; column += s.chunk) {
    vf sum[MR][V];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[m][v] = vf{};
    const int64_t left = s.columns - column;
    const int64_t steps = (s.chunk < left ? s.chunk : left) / Dot::columns;
    for (int64_t step = 0; step < steps; step += kSteps)
#pragma GCC unroll 8
      for (int i = 0; i < kSteps; ++i, codes += V * VL * 4, x += stride) {
        vi w[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) w[v] = vloadi(codes + v * VL * 4);
        if (MR > 8 || (MR >= 6 && i % 2 == 0)) stream_lines<1>(x + kRowsAhead);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const vi xm = splat_word(x + 4 * m);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) sum[m][v] = Dot::dot(sum[m][v], w[v], xm);
        }
      }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const float* at = scales + v / NV * kPanelScales + v % NV * VL;
      const vf d = vload(at);
      if (s.sums == Sums::scaled) {
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m)
          total.set(m, v, vfma_once(sum[m][v], d * splat_float(x + 4 * m), total.get(m, v)));
      } else if (s.sums == Sums::minimum) {
        const vf minimum = vload(at + kPanelRows);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m)
          total.set(
              m, v,
              vfma_once(minimum, splat_float(x + 4 * m), vfma_once(sum[m][v], d, total.get(m, v))));
      } else {
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) total.set(m, v, vfma_once(sum[m][v], d, total.get(m, v)));
      }
    }
    total.stay();
    x += stride;
    scales += NP * kPanelScales;
  }
  total.end();
}

// SIGNED: codes are signed where dots want unsigned ones.
template <Sums KIND, bool SIGNED, int MR, int NP>
void int8_segment_tile(const Segment& s, const char* x, int64_t width, float* sums) {
  constexpr int V = NP * NV, parts = KIND == Sums::halves ? 2 : 1;
  constexpr int records = parts == 2 ? 44 : 40;
  auto total = TileSums<MR, V, parts>::begin(sums, s.first);
  const uint8_t* codes = s.codes;
  const float* scales = s.scales;
  const int64_t stride = width * records;
  for (int64_t column = 0; column < s.columns; column += kBlock, x += stride) {
    vi sum[MR][V];
    const auto dots = [&](int first, int last) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int i = first; i < last; ++i) {
        vi w[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) w[v] = vloadi(codes + (i * V + v) * VL * 4);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const vi word = splat_word(x + m * records + 4 * i);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v)
            sum[m][v] =
                SIGNED ? dot_signed(sum[m][v], w[v], word) : dot_unsigned(sum[m][v], w[v], word);
        }
      }
    };
    const auto begin = [&](int word) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const vi start = KIND == Sums::halves ? splat_word(x + m * records + word) : vi{};
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[m][v] = start;
      }
    };
    begin(36);
    if constexpr (KIND == Sums::halves) {
      alignas(64) vi low[MR][V];
      dots(0, 4);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const vi f = vloadi(scales + v / NV * kPanelScales + kPanelRows + v % NV * VL);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) low[m][v] = sum[m][v] * f;
      }
      begin(40);
      dots(4, 8);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const vi f = vloadi(scales + v / NV * kPanelScales + 2 * kPanelRows + v % NV * VL);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) sum[m][v] = sum[m][v] * f + low[m][v];
      }
    } else {
      dots(0, 8);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const float* at = scales + v / NV * kPanelScales + v % NV * VL;
      const vf d = vload(at);
      vf minimum = vf{};
      if constexpr (KIND == Sums::minimum) minimum = vload(at + kPanelRows);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        // Sums that began with it would be copied from it: 17.9 ns a block and 6 rows, not 16.7.
        if constexpr (KIND == Sums::plain) sum[m][v] += splat_word(x + m * records + 36);
        vf t = vfma_once(__builtin_convertvector(sum[m][v], vf),
                         d * splat_float(x + m * records + 32), total.get(m, v));
        if constexpr (KIND == Sums::minimum)
          t = vfma_once(minimum, splat_float(x + m * records + 36), t);
        total.set(m, v, t);
      }
    }
    total.stay();
    codes += 8 * V * VL * 4;
    scales += NP * kPanelScales;
  }
  total.end();
}

// Shapes of tiles, few_tile's first.
#if defined(__AVX512F__)
constexpr TileShape kShapes[] = {{1, 4}, {2, 4}, {2, 2}, {4, 4}, {4, 2},
                                 {6, 2}, {7, 2}, {8, 2}, {12, 2}};
#elif defined(__AVX2__)
constexpr TileShape kShapes[] = {{1, 2}, {2, 2}, {4, 1}, {6, 1}};
#else
constexpr TileShape kShapes[] = {{1, 1}, {2, 1}};
#endif
constexpr int kShapeCount = sizeof kShapes / sizeof kShapes[0];

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
