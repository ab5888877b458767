// Rows of x as the tiles of quantized weights read them.
//   int8:  records of 32 int8, a scale, and what completes a sum (below)
//   else:  words of a pair of bf16 or of a float, after every chunk one word: the sum of its x (of
//          formats with a minimum), or dx (mode fp8)
#pragma once
#include "cpu/integers.h"
#include "cpu/matmul_int8.h"
#include "cpu/quant_kernels.h"
#include "cpu/transpose.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Behind 32 codes and dx: minus offset times the sum of the codes (two for the halves of a block),
// which is the start of the integer sum, or dx times that sum, which a minimum multiplies.
FASTLLM_INLINE int64_t record_bytes(Sums sums) { return sums == Sums::halves ? 44 : 40; }

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

// Lane i: all lanes of x[i] folded by op.
template <class Op>
FASTLLM_INLINE i4 fold_four(const vi* x, const Op& op) {
  i4 v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    i4 parts[VL / 4];
    __builtin_memcpy(parts, x + i, sizeof parts);
    v[i] = parts[0];
#pragma GCC unroll 4
    for (int p = 1; p < VL / 4; ++p) v[i] = op(v[i], parts[p]);
  }
  const i4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, even = {0, 1, 4, 5}, odd = {2, 3, 6, 7};
  const i4 a = op(__builtin_shuffle(v[0], v[1], low), __builtin_shuffle(v[0], v[1], high));
  const i4 b = op(__builtin_shuffle(v[2], v[3], low), __builtin_shuffle(v[2], v[3], high));
  return op(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd));
}

// Up to four blocks of 32 columns to int8 records `step` bytes apart. (Their sums over lanes and
// their divisions are done together: a block at a time takes twice as long.)
// amax is found on the bit patterns, where NaN is above everything: it ends in the scale and is not
// lost. The codes beside such a scale, and beside an infinite one, are zeros.
template <bool HALVES, class X>
FASTLLM_INLINE void quantize_blocks(const X* x, int64_t blocks, Sums sums, int32_t offset, char* to,
                                    int64_t step) {
  constexpr int parts = kBlock / VL;
  const auto add = [](i4 a, i4 b) __attribute__((always_inline)) { return a + b; };
  const auto larger_of = [](i4 a, i4 b) __attribute__((always_inline)) { return a > b ? a : b; };
  vf v[4][parts];
  vi top[4], total[HALVES + 1][4];
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const X* from = x + (b < blocks ? b : 0) * kBlock;
    top[b] = vi{};
#pragma GCC unroll 8
    for (int i = 0; i < parts; ++i) {
      v[b][i] = load(from + i * VL);
      const vi magnitude = vbits(v[b][i]) & 0x7fffffff;
      top[b] = magnitude > top[b] ? magnitude : top[b];
    }
  }
  const f4 amax = (f4)fold_four(top, larger_of), scale = amax / 127.f;
  f4 inverse = 127.f / amax;
  inverse = inverse <= __FLT_MAX__ ? inverse : f4{};  // else zero, too small a block, or NaN
  const vf magic = vset(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const vf factor = vset(inverse[b]);
    const vi live = factor > 0.f;
    int8_t* q = reinterpret_cast<int8_t*>(to + b * step);
    total[0][b] = total[HALVES][b] = vi{};
#pragma GCC unroll 8
    for (int i = 0; i < parts; ++i) {
      const vi codes = (vbits(v[b][i] * factor + magic) - vbits(magic)) & live;
      total[HALVES ? i * VL / 16 : 0][b] += codes;
      if (b >= blocks) continue;
#if defined(__AVX512F__)  // GCC converts vectors of bytes by many shuffles
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i * VL),
                       _mm512_cvtepi32_epi8((__m512i)codes));
#else
      typedef int8_t vb __attribute__((vector_size(VL)));
      const vb bytes = __builtin_convertvector(codes, vb);
      __builtin_memcpy(q + i * VL, &bytes, sizeof bytes);
#endif
    }
  }
  const i4 sum = fold_four(total[0], add), second = fold_four(total[HALVES], add);
  const f4 weighted = __builtin_convertvector(sum, f4) * scale;
  const f4 more = sums == Sums::minimum ? weighted : (f4)(-offset * sum);
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    if (b >= blocks) break;
    const float words[3] = {scale[b], more[b], ((f4)(-offset * second))[b]};
    __builtin_memcpy(to + b * step + kBlock, words, HALVES ? 12 : 8);
  }
}

template <bool HALVES, class X>
void quantize_row(const X* x, const QuantKernel& kernel, char* to, int64_t width) {
  const int64_t step = record_bytes(kernel.sums) * width;
  for (int64_t c = 0; c < kernel.k; c += 4 * kBlock, to += 4 * step)
    quantize_blocks<HALVES>(x + c, smaller((kernel.k - c) / kBlock, 4), kernel.sums, kernel.offset,
                            to, step);
}

template <bool HALVES>
void prepare_int8(const QuantKernel& kernel, const void* x, DType type, char* to, int64_t width) {
  const int64_t size = record_bytes(kernel.sums);
  if (!x)
    for (int64_t c = 0; c < kernel.k; c += kBlock, to += size * width)
      __builtin_memset(to, 0, static_cast<size_t>(size));
  else if (type == DType::bf16)
    quantize_row<HALVES>(static_cast<const uint16_t*>(x), kernel, to, width);
  else
    quantize_row<HALVES>(static_cast<const float*>(x), kernel, to, width);
}

// 32 columns rounded to e4m3, as floats; x is at most 464 in magnitude, or NaN.
FASTLLM_INLINE vf round_float8(vf x) {
  const vi bits = vbits(x);
  const vi rounded = (bits + (0x7ffff + ((bits >> 20) & 1))) & static_cast<int32_t>(0xfff00000);
  const vf magic = vset(24576.f);  // 1.5 * 2^14: its distance of floats is 2^-9, the smallest e4m3
  const vi sign = bits & static_cast<int32_t>(0x80000000);
  const vi small = vbits((vabs(x) + magic) - magic) | sign;
  const vi value = vabs(x) < vset(1.f / 64) ? small : rounded;
  return vbits(x != x ? bits : value);
}
template <class X>
FASTLLM_INLINE float quantize_float8(const X* x, int64_t n, float* q) {
  vi top = vi{};
  for (int64_t c = 0; c < n; c += VL) {
    const vi magnitude = vbits(load(x + c)) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  const float amax = __builtin_bit_cast(float, reduce_max(top));
  float inverse = 448.f / amax;
  if (!(inverse <= __FLT_MAX__)) inverse = 0.f;
  for (int64_t c = 0; c < n; c += VL) vstore(q + c, round_float8(load(x + c) * inverse));
  return amax / 448.f;
}

// The sum of 32 columns, and of a chunk: of its blocks of 32 in ascending order.
template <class X>
FASTLLM_INLINE float chunk_sum(const X* x, int64_t n) {
  float total = 0.f;
  for (int64_t c = 0; c < n; c += kBlock) {
    vf sum = vf{};
    for (int i = 0; i < kBlock; i += VL) sum += load(x + c + i);
    const float block = reduce_add(sum);
    total = c ? total + block : block;
  }
  return total;
}

// The words of 16 columns: 16 floats, or 8 pairs (4 i + s, 4 i + s + 2) or (2 s, 2 s + 1).
template <int COLUMNS, bool BY_TWO, class X>
FASTLLM_INLINE void half_words(const X* x, uint32_t* to, int64_t width) {
  if constexpr (COLUMNS == 1) {
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) to[c * width] = __builtin_bit_cast(uint32_t, load1(x + c));
  } else {
    alignas(32) uint16_t bits[16];
    if constexpr (sizeof(X) == 2)
      __builtin_memcpy(bits, x, sizeof bits);
    else
      for (int c = 0; c < 16; c += VL) vstore_bf16(bits + c, load(x + c));  // exact
    if constexpr (BY_TWO) {
      const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m128i* at = reinterpret_cast<__m128i*>(bits) + i;
        _mm_store_si128(at, _mm_shuffle_epi8(_mm_load_si128(at), order));
      }
    }
#pragma GCC unroll 8
    for (int w = 0; w < 8; ++w) __builtin_memcpy(to + w * width, bits + 2 * w, 4);
  }
}

template <int COLUMNS, bool BY_TWO, class X>
void words_of_row(const QuantKernel& kernel, const X* x, uint32_t* to, int64_t width) {
  alignas(64) float codes[128];
  for (int64_t c = 0; c < kernel.k; c += kernel.chunk) {
    const int64_t n = smaller(kernel.chunk, kernel.k - c);
    float extra = 0.f;
    if (kernel.sums == Sums::scaled) {
      extra = quantize_float8(x + c, n, codes);
      for (int64_t i = 0; i < n; i += 16, to += 16 / COLUMNS * width)
        half_words<COLUMNS, BY_TWO>(codes + i, to, width);
    } else {
      for (int64_t i = 0; i < n; i += 16, to += 16 / COLUMNS * width)
        half_words<COLUMNS, BY_TWO>(x + c + i, to, width);
      if (kernel.sums == Sums::minimum) extra = chunk_sum(x + c, n);
    }
    *to = __builtin_bit_cast(uint32_t, extra);
    to += width;
  }
}

template <int COLUMNS, bool BY_TWO>
void prepare_words(const QuantKernel& kernel, const void* x, DType type, char* to, int64_t width) {
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  if (!x) {
    for (int64_t i = 0; i < kernel.row_bytes() / 4; ++i) words[i * width] = 0;
  } else if (type == DType::bf16) {
    words_of_row<COLUMNS, BY_TWO>(kernel, static_cast<const uint16_t*>(x), words, width);
  } else if (COLUMNS == 1 || kernel.sums == Sums::scaled) {
    words_of_row<COLUMNS, BY_TWO>(kernel, static_cast<const float*>(x), words, width);
  }
}

#if defined(__AVX512BF16__)
// What prepare_words<2, BY_TWO> makes of `live` rows of bf16, `stride` elements apart, and of rows of
// zeros behind them, `width` in all: 16 words of each are transposed in registers.
template <bool BY_TWO>
void prepare_pairs(const QuantKernel& kernel, const uint16_t* x, int64_t stride, int64_t live,
                   char* to, int64_t width) {
  uint32_t* out = reinterpret_cast<uint32_t*>(to);
  const __mmask16 all = static_cast<__mmask16>((1 << width) - 1);
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  const auto store = [&](vi words) __attribute__((always_inline)) {
    _mm512_mask_storeu_epi32(out, all, (__m512i)words);
    out += width;
  };
  int64_t begin = 0;  // of a chunk
  const auto end_chunk = [&](int64_t column) __attribute__((always_inline)) {
    if (column - begin < kernel.chunk && column < kernel.k) return;
    alignas(64) float sums[kPanelRows] = {};
    if (kernel.sums == Sums::minimum)
      for (int64_t i = 0; i < live; ++i)
        sums[i] = chunk_sum(x + i * stride + begin, column - begin);
    store(vloadi(sums));
    begin = column;
  };
  for (int64_t column = 0; column < kernel.k; column += kBlock) {
    // The other core read these lines in the last product; GCC would ask to read them.
    for (int64_t b = 0; b < (16 * 4 + 4) * width; b += 64)
      asm volatile("prefetchw %0" ::"m"(*(reinterpret_cast<const char*>(out) + 1024 + b)));
    vi r[16] = {};
#pragma GCC unroll 12
    for (int i = 0; i < kWideRows; ++i) {
      if (i >= live) continue;
      r[i] = vloadi(x + i * stride + column);
      if (BY_TWO) r[i] = (vi)_mm512_shuffle_epi8((__m512i)r[i], order);
    }
    transpose_16x16(r);
#pragma GCC unroll 8
    for (int w = 0; w < 8; ++w) store(r[w]);
    if (kernel.chunk < kBlock) end_chunk(column + 16);
#pragma GCC unroll 8
    for (int w = 8; w < 16; ++w) store(r[w]);
    end_chunk(column + kBlock);
  }
}
#endif

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
