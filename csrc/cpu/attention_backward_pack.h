// How the backward of attention keeps its operands: rows of q, k, v and grad_o copied once into the
// orders in which its products read them.
//
// A word is what one lane takes per step of a product: an f32, or a pair of bf16 that are
// neighbours along the summed dimension (only where vdpbf16ps takes pairs; elsewhere 16-bit
// elements are widened here, so that every product there is one of floats). Products multiply
//   rows:    [row / kRows][step][kRows]      words that are broadcast, by
//   columns: [column / kWide][step][kWide]   words that fill vectors.
#pragma once
#include "cpu/attention_tile.h"
#include "cpu/transpose.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int kRows = VL == 16 ? 8 : 4;  // x 2 vectors: 16 chains, or 8 where registers are few
constexpr int kWide = 2 * VL;
constexpr int kQueries = 64;  // rows of a query tile, lanes of its transposed scores
constexpr int kSlab = 16;     // rows copied at once; what is packed is a multiple of it

struct GradF32 {
  using Elem = float;
  using Word = float;
  static constexpr int kPair = 1;
  // Steps of a chain over dimensions and over queries or keys: longer ones lose to a blocked GEMM.
  // Scores are summed as the forward pass sums them: their errors and those of lse then cancel.
  static constexpr int kDimChain = 8, kChain = 32;
  // In base e, where neither lse nor its difference from a logit is rounded once more.
  static constexpr float kBase = 1.f;
  FASTLLM_INLINE vf power(vf x) { return vexp(x); }
  FASTLLM_INLINE vf rounded(vf x) { return x; }
};
struct GradF16 {
  using Elem = Half;
  using Word = float;
  static constexpr int kPair = 1;
  static constexpr int kDimChain = 1 << 20, kChain = 1 << 20;
  static constexpr float kBase = 1.44269504088896341f;   // lse and logits in base 2
  FASTLLM_INLINE vf power(vf x) { return vexp2<4>(x); }  // 2.8e-6; P is rounded 90 times coarser
  FASTLLM_INLINE vf rounded(vf x) { return vround_f16(x); }
};
struct GradBf16 {
  using Elem = uint16_t;
#if defined(__AVX512BF16__)
  using Word = uint32_t;
  static constexpr int kPair = 2;
#else
  using Word = float;
  static constexpr int kPair = 1;
#endif
  static constexpr int kDimChain = 1 << 20, kChain = 1 << 20;
  static constexpr float kBase = 1.44269504088896341f;   // lse and logits in base 2
  FASTLLM_INLINE vf power(vf x) { return vexp2<4>(x); }  // 2.8e-6; P is rounded 90 times coarser
  FASTLLM_INLINE vf rounded(vf x) { return vround_bf16(x); }
};

FASTLLM_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Elements of a row of a slab, which end in zeros: whole blocks of columns and whole words of a
// transposition.
FASTLLM_INLINE int64_t padded_dim(int64_t dim) { return round_up(dim, kWide > 32 ? kWide : 32); }

// A row as words of `padded` elements, zeros past dim.
FASTLLM_INLINE void copy_row(uint32_t* to, const uint16_t* from, int64_t dim, int64_t padded) {
  __builtin_memcpy(to, from, dim * 2);
  __builtin_memset(reinterpret_cast<char*>(to) + dim * 2, 0, (padded - dim) * 2);
}
template <class T>
FASTLLM_INLINE void copy_row(float* to, const T* from, int64_t dim, int64_t padded) {
  int64_t d = 0;
  for (; d + VL <= dim; d += VL) vstore(to + d, load(from + d));
  if (d < dim) {
    vstore(to + d, load_n(from + d, dim - d));
    d += VL;
  }
  for (; d < padded; d += VL) vstore(to + d, vset(0.f));
}

// to[r / Width][step][r % Width] for kSlab rows of a slab whose first is `row`.
template <int Width, class Word>
FASTLLM_INLINE void transpose_slab(Word* to, int64_t row, const Word* slab, int64_t stride,
                                   int64_t steps) {
#if defined(__AVX512F__)
  for (int64_t step = 0; step < steps; step += 16) {
    vi column[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) column[r] = (vi)_mm512_loadu_si512(slab + r * stride + step);
    transpose_16x16(column);
    const int count = steps - step < 16 ? static_cast<int>(steps - step) : 16;
    for (int i = 0; i < count; ++i) {
      if constexpr (Width >= 16) {
        Word* at = to + row / Width * Width * steps + (step + i) * Width + row % Width;
        __builtin_memcpy(at, &column[i], sizeof column[i]);
      } else {
        static_assert(Width == 8 || Width >= 16);
        Word* at = to + row * steps + (step + i) * Width;
        const __m256i low = _mm512_castsi512_si256((__m512i)column[i]);
        const __m256i high = _mm512_extracti64x4_epi64((__m512i)column[i], 1);
        __builtin_memcpy(at, &low, sizeof low);
        __builtin_memcpy(at + Width * steps, &high, sizeof high);
      }
    }
  }
#else
  for (int r = 0; r < kSlab; ++r) {
    Word* at = to + (row + r) / Width * Width * steps + (row + r) % Width;
    for (int64_t step = 0; step < steps; ++step) at[step * Width] = slab[r * stride + step];
  }
#endif
}

// to[column / kWide][row / pair][kWide]: rows as steps, `steps` of them in all.
FASTLLM_INLINE void columns_of_slab(float* to, int64_t row, const float* slab, int64_t padded,
                                    int64_t steps) {
  for (int64_t d = 0; d < padded; d += VL)
    for (int r = 0; r < kSlab; ++r)
      vstore(to + (d / kWide * steps + row + r) * kWide + d % kWide, vload(slab + r * padded + d));
}
#if defined(__AVX512BF16__)
FASTLLM_INLINE void columns_of_slab(uint32_t* to, int64_t row, const uint32_t* slab, int64_t padded,
                                    int64_t steps) {
  for (int64_t d = 0; d < padded; d += 16)
    for (int r = 0; r < kSlab; r += 2) {
      const uint32_t* even = slab + (r * padded + d) / 2;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
      const __m512i high =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + padded / 2)));
      _mm512_storeu_si512(to + (d / kWide * steps + (row + r) / 2) * kWide + d % kWide,
                          _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}
#endif

// Packs `rows` rows of dim elements, `stride` apart, as the row operand or as the column operand of
// products over dim (`across`, of blocks of Width), and as the column operand of products over rows
// (`along`; may be null). Dead rows count as zeros, whatever they hold; so do those that fill the
// last block. slab: kSlab * padded_dim(dim) elements.
template <class E, int Width>
static void pack_rows(typename E::Word* across, typename E::Word* along, typename E::Word* slab,
                      const typename E::Elem* from, int64_t stride, int64_t rows, int64_t dim,
                      const uint8_t* alive) {
  const int64_t padded = padded_dim(dim), words = padded / E::kPair;
  const int64_t end = round_up(rows, kWide > kSlab ? kWide : kSlab);
  for (int64_t row = 0; row < end; row += kSlab) {
    for (int64_t r = row; r < row + kSlab; ++r) {
      typename E::Word* to = slab + (r - row) * words;
      if (r < rows && alive[r])
        copy_row(to, from + r * stride, dim, padded);
      else
        __builtin_memset(to, 0, words * sizeof(*to));
    }
    transpose_slab<Width>(across, row, slab, words, dim / E::kPair);
    if (along) columns_of_slab(along, row, slab, padded, kQueries / E::kPair);
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
