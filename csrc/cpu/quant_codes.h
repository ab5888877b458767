// The codes and scales of quantized formats, decoded in registers: a lane of 16 (NV vectors of VL)
// is a row of a panel. A block is 32 columns; its byte words are counted in the order of columns:
// word i of half h holds columns 16 h + 4 i + j in the bytes j of a lane.
#pragma once
#include "common/formats.h"
#include "cpu/packed.h"
#include "cpu/signed_words.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Kinds of codes. `words` of 4 bytes a block and row; raw(): the stored codes of a byte word;
// value = code - offset where codes are numbers; `paired`: which columns of a byte word make a pair
// of bf16, (j, j + 2) or (2 j, 2 j + 1), which both keep the words of a pair in one lane.
template <int OFFSET>
struct Nibbles {
  static constexpr int words = 4, offset = OFFSET;
  static constexpr bool is_signed = false, paired_by_two = true;
  FASTLLM_INLINE vi raw(const uint8_t* block, int v, int i, int half) {
    const vi word = vloadi(block + (i * kPanelRows + v * VL) * 4);
    return (half ? word >> 4 : word) & 0x0f0f0f0f;
  }
};
template <int OFFSET>
struct FiveBits {
  static constexpr int words = 5, offset = OFFSET;
  static constexpr bool is_signed = false, paired_by_two = true;
  FASTLLM_INLINE vi raw(const uint8_t* block, int v, int i, int half) {
    const vi high = vloadi(block + (4 * kPanelRows + v * VL) * 4);
    return Nibbles<0>::raw(block, v, i, half) | ((half ? high >> i : high << (4 - i)) & 0x10101010);
  }
};
struct SixBits {
  static constexpr int words = 6, offset = 32;
  static constexpr bool is_signed = false, paired_by_two = true;
  FASTLLM_INLINE vi raw(const uint8_t* block, int v, int i, int half) {
    const vi high = vloadi(block + ((4 + half) * kPanelRows + v * VL) * 4);
    return Nibbles<0>::raw(block, v, i, half) |
           ((i < 3 ? high << (4 - 2 * i) : high >> 2) & 0x30303030);
  }
};
template <class C>
struct ByteCodes {
  static constexpr int words = 8, offset = 0;
  static constexpr bool paired_by_two = false;
  FASTLLM_INLINE vi raw(const uint8_t* block, int v, int i, int half) {
    return vloadi(block + ((4 * half + i) * kPanelRows + v * VL) * 4);
  }
};
struct SignedBytes : ByteCodes<SignedBytes> {
  static constexpr bool is_signed = true;
};
// e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, 0x7f is NaN.
struct Float8 : ByteCodes<Float8> {
  static constexpr bool is_signed = true;
};
struct NormalFloat {
  static constexpr int words = 4, offset = 0;
  static constexpr bool is_signed = true, paired_by_two = true;
  FASTLLM_INLINE vi raw(const uint8_t* block, int v, int i, int half) {
    return Nibbles<0>::raw(block, v, i, half);
  }
};

// The NormalFloat-4 values rounded to bf16, and 127 times them as int8.
alignas(16) static constexpr uint16_t kNormalFloat[16] = {
    0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000,
    0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80};
alignas(16) static constexpr int8_t kNormalFloat8[16] = {-127, -88, -66, -50, -36, -23, -12, 0,
                                                         10,   20,  31,  43,  56,  71,  92,  127};

// table[index] of every byte (indices 0 to 15).
FASTLLM_INLINE vi look_up_bytes(const void* table, vi index) {
  const __m128i t = _mm_load_si128(static_cast<const __m128i*>(table));
#if defined(__AVX512BW__)
  return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), (__m512i)index);
#elif defined(__AVX2__)
  return (vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), (__m256i)index);
#else
  return (vi)_mm_shuffle_epi8(t, (__m128i)index);
#endif
}

// The codes of a byte word as int8 products take them: unsigned ones (value = code - offset) or
// signed ones.
template <class C>
FASTLLM_INLINE vi int8_codes(vi raw) {
  if constexpr (__is_same(C, NormalFloat))
    return look_up_bytes(kNormalFloat8, raw);
  else
    return raw;
}

// The value of an e4m3 in the low byte of each lane (the rest is zero), exact.
FASTLLM_INLINE vf float8_value(vi code) {
  const vi magnitude = code & 0x7f;
  const vi normal = (magnitude << 20) + (120 << 23);
  const vi small = vbits(__builtin_convertvector(magnitude, vf) * (1.f / 512));  // exponent field 0
  vi value = magnitude < 8 ? small : normal;
  value = magnitude == 0x7f ? vseti(0x7fc00000) : value;
  return vbits(value | ((code & 0x80) << 24));
}

// The unscaled values of a byte word: out[j] is column j of its four.
template <class C>
FASTLLM_INLINE void decode_floats(vi raw, vf* out) {
  if constexpr (__is_same(C, NormalFloat)) {
#if defined(__AVX512F__)
    const __m512i table = _mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kNormalFloat))),
        16);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)  // vpermps looks at 4 bits of each lane
      out[j] = (vf)_mm512_permutexvar_ps((__m512i)(raw >> (8 * j)), (__m512)table);
#else
    alignas(16) uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i)
      low[i] = static_cast<uint8_t>(kNormalFloat[i]), high[i] = kNormalFloat[i] >> 8;
    const vi first = look_up_bytes(low, raw), second = look_up_bytes(high, raw);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      out[j] = vbits((((first >> (8 * j)) & 0xff) << 16) | (((second >> (8 * j)) & 0xff) << 24));
#endif
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if constexpr (__is_same(C, Float8))
        out[j] = float8_value((raw >> (8 * j)) & 0xff);
      else if constexpr (C::is_signed)
        out[j] = __builtin_convertvector(raw << (24 - 8 * j) >> 24, vf);
      else
        out[j] = __builtin_convertvector(((raw >> (8 * j)) & 0xff) - C::offset, vf);
    }
  }
}

// 16 columns (half `half` of a block) of VL rows, unscaled.
template <class C>
FASTLLM_INLINE void decode_half(const uint8_t* block, int half, int v, vf* out) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) decode_floats<C>(C::raw(block, v, i, half), out + 4 * i);
}

#if defined(__AVX512BF16__)
// bf16 of the numbers 0 to 63.
struct SmallNumbers {
  uint16_t bits[64];
};
constexpr SmallNumbers numbers_from(int first, int period) {
  SmallNumbers n{};
  for (int i = 0; i < 64; ++i)
    n.bits[i] = static_cast<uint16_t>(
        __builtin_bit_cast(uint32_t, static_cast<float>(first + i % period)) >> 16);
  return n;
}
template <int FIRST, int PERIOD>
alignas(64) static constexpr SmallNumbers kNumbers = numbers_from(FIRST, PERIOD);

// e4m3 in the high byte of each 16 bits (the other is 0) as bf16, wrong for NaN and exponent
// fields of 0: the sign stays where it is, and the exponent is 120 larger.
FASTLLM_INLINE __m512i normal_float8(__m512i code) {
  const __m512i fields =
      _mm512_and_si512(_mm512_srai_epi16(code, 4), _mm512_set1_epi16(static_cast<short>(0x87f0)));
  return _mm512_add_epi16(fields, _mm512_set1_epi16(120 << 7));
}

// The same of every code, exact.
FASTLLM_INLINE __m512i any_float8(__m512i code) {
  alignas(64) static constexpr uint16_t small[32] = {0x0000, 0x3b00, 0x3b80, 0x3bc0,
                                                     0x3c00, 0x3c20, 0x3c40, 0x3c60};
  const __m512i magnitude = _mm512_and_si512(_mm512_srli_epi16(code, 8), _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi16(static_cast<short>(0x8000)));
  __m512i value = _mm512_mask_permutexvar_epi16(
      normal_float8(code), _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude,
      _mm512_load_si512(small));
  value = _mm512_mask_mov_epi16(value, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
                                _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(value, sign);
}

// 64 codes e4m3, exact: columns 0 and 1 of each lane, then 2 and 3. Of weights one code in 10,000 has
// an exponent field of 0 (normal numbers scaled to 448 at most): 3 instructions that look for
// one, and then most often 4 for 32 codes, cost less than 12 for 32 codes always.
FASTLLM_INLINE void float8_pairs(__m512i raw, vi* out) {
  alignas(64) static constexpr int8_t spread[2][16] = {
      {-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13},
      {-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15}};
  const auto codes = [&](int s) __attribute__((always_inline)) {
    const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(spread[s]));
    return _mm512_shuffle_epi8(raw, _mm512_broadcast_i32x4(places));
  };
  // Magnitudes 0x7f and 0 to 7, plus one: 0 to 8.
  const __m512i next =
      _mm512_and_si512(_mm512_add_epi8(raw, _mm512_set1_epi8(1)), _mm512_set1_epi8(0x7f));
  if (__builtin_expect(_mm512_cmple_epu8_mask(next, _mm512_set1_epi8(8)) == 0, 1)) {
    out[0] = (vi)normal_float8(codes(0));
    out[1] = (vi)normal_float8(codes(1));
  } else {
    out[0] = (vi)any_float8(codes(0));
    out[1] = (vi)any_float8(codes(1));
  }
}

// 64 codes of int8: columns 0 and 1 of each lane, then 2 and 3.
FASTLLM_INLINE void signed_pairs(__m512i raw, vi* out) {
  const __m128i places = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  __m512i seen{};
  const Words words =
      signed_words<true>(_mm512_shuffle_epi8(raw, _mm512_broadcast_i32x4(places)), seen);
  out[0] = words.lower;
  out[1] = words.upper;
}

// The unscaled values of a byte word as two words of bf16 pairs. BYTES: int8 by tables of bytes, 11
// instructions of which half run beside dots, and not by 16 shifts and conversions. Codes in the
// cache, GB/s of a Zen 4 core: 1 row 17 -> 24, 2 rows 16 -> 21, 3 and 4 rows 13 and 13, 8 rows
// 11 -> 10.
template <class C, bool BYTES = false>
FASTLLM_INLINE void decode_pairs(vi raw, vi* out) {
  if constexpr (__is_same(C, SignedBytes) && BYTES) {
    signed_pairs((__m512i)raw, out);
  } else if constexpr (__is_same(C, SignedBytes)) {
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      // An int8 has at most 8 significant bits: the top half of its fp32 is exact.
      const vi first = vbits(__builtin_convertvector(raw << (24 - 16 * s) >> 24, vf));
      const vi second = vbits(__builtin_convertvector(raw << (16 - 16 * s) >> 24, vf));
      out[s] = (vi)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)first, 16),
                                           (__m512i)second);
    }
  } else if constexpr (__is_same(C, Float8)) {
    float8_pairs((__m512i)raw, out);
  } else {
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      const __m512i index = (__m512i)(raw >> (8 * s));
      if constexpr (__is_same(C, SixBits)) {
        const uint16_t* table = kNumbers<-32, 64>.bits;
        out[s] = (vi)_mm512_permutex2var_epi16(_mm512_load_si512(table), index,
                                               _mm512_load_si512(table + 32));
      } else if constexpr (__is_same(C, NormalFloat)) {
        const __m512i table = _mm512_broadcast_i64x4(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kNormalFloat)));
        out[s] = (vi)_mm512_permutexvar_epi16(index, table);
      } else {  // vpermw looks at 5 bits of each 16: a table of 16 codes stands there twice
        const uint16_t* table = kNumbers<-C::offset, (C::words == 4 ? 16 : 32)>.bits;
        out[s] = (vi)_mm512_permutexvar_epi16(index, _mm512_load_si512(table));
      }
    }
  }
}
#endif

// VL bytes, one to a lane.
FASTLLM_INLINE vi vload_u8(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  int32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return (vi)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes));
#endif
}
FASTLLM_INLINE vi vload_i8(const uint8_t* p) { return vload_u8(p) << 24 >> 24; }

// Kinds of scales of a panel. d(): what the code of a column is multiplied by; minimum(): what is
// added, its sign included. All are exact in fp32 but nf4_dq's, which is rounded once. `shift`: log2
// of the columns under one scale. integer_scales: in mode int8, d_super() is the scale and
// factor() an integer that multiplies the sum of 16 columns.
struct HalfScales {
  static constexpr bool has_minimum = false, integer_scales = false;
  FASTLLM_INLINE vf d(const uint8_t* s, int64_t, int64_t column, int shift, int v) {
    return vload_f16(s + ((column >> shift) * kPanelRows + v * VL) * 2);
  }
};
struct HalfMinimums {
  static constexpr bool has_minimum = true, integer_scales = false;
  FASTLLM_INLINE vf d(const uint8_t* s, int64_t, int64_t column, int shift, int v) {
    return vload_f16(s + ((column >> shift) * 2 * kPanelRows + v * VL) * 2);
  }
  FASTLLM_INLINE vf minimum(const uint8_t* s, int64_t, int64_t column, int shift, int v) {
    return vload_f16(s + (((column >> shift) * 2 + 1) * kPanelRows + v * VL) * 2);
  }
};
struct HalfZeros {
  static constexpr bool has_minimum = true, integer_scales = false;
  FASTLLM_INLINE vf d(const uint8_t* s, int64_t k, int64_t column, int shift, int v) {
    return HalfMinimums::d(s, k, column, shift, v);
  }
  FASTLLM_INLINE vf minimum(const uint8_t* s, int64_t k, int64_t column, int shift, int v) {
    return -(HalfMinimums::d(s, k, column, shift, v) *
             HalfMinimums::minimum(s, k, column, shift, v));
  }
};
struct FloatScales {
  static constexpr bool has_minimum = false, integer_scales = false;
  FASTLLM_INLINE vf d(const uint8_t* s, int64_t, int64_t column, int shift, int v) {
    return vbits(vloadi(s + ((column >> shift) * kPanelRows + v * VL) * 4));
  }
};
struct DoubleScales {
  static constexpr bool has_minimum = false, integer_scales = false;
  FASTLLM_INLINE vf d(const uint8_t* s, int64_t, int64_t column, int shift, int v) {
    const vi factor = vload_u8(s + 4 * kPanelRows + (column >> shift) * kPanelRows + v * VL);
    return vbits(vloadi(s + v * VL * 4)) * __builtin_convertvector(factor, vf);
  }
};
struct SuperScales {
  static constexpr bool has_minimum = true, integer_scales = false;
  FASTLLM_INLINE vf d(const uint8_t* s, int64_t, int64_t column, int, int v) {
    const uint8_t* record = s + (column >> 8) * 20 * kPanelRows;
    const uint8_t* sub = record + (4 + (column >> 5) % 8 * 2) * kPanelRows;
    return vload_f16(record + v * VL * 2) * __builtin_convertvector(vload_u8(sub + v * VL), vf);
  }
  FASTLLM_INLINE vf minimum(const uint8_t* s, int64_t, int64_t column, int, int v) {
    const uint8_t* record = s + (column >> 8) * 20 * kPanelRows;
    const uint8_t* sub = record + (5 + (column >> 5) % 8 * 2) * kPanelRows;
    return -(vload_f16(record + (2 * kPanelRows + v * VL * 2)) *
             __builtin_convertvector(vload_u8(sub + v * VL), vf));
  }
};
struct SuperScales6 {
  static constexpr bool has_minimum = false, integer_scales = true;
  FASTLLM_INLINE vf d_super(const uint8_t* s, int64_t column, int v) {
    return vload_f16(s + (column >> 8) * 18 * kPanelRows + v * VL * 2);
  }
  FASTLLM_INLINE vi factor(const uint8_t* s, int64_t column, int v) {
    return vload_i8(s + (column >> 8) * 18 * kPanelRows + (2 + (column >> 4) % 16) * kPanelRows +
                    v * VL);
  }
  FASTLLM_INLINE vf d(const uint8_t* s, int64_t, int64_t column, int, int v) {
    return d_super(s, column, v) * __builtin_convertvector(factor(s, column, v), vf);
  }
};

// A format: its kinds, and the columns under one scale, which several formats of one kind differ in.
template <class C, class S>
struct Quantized {
  using Codes = C;
  using Scales = S;
  static constexpr int64_t block_bytes = C::words * 4 * kPanelRows;
  int shift;
  vf d(const uint8_t* scales, int64_t k, int64_t column, int v) const {
    return S::d(scales, k, column, shift, v);
  }
  vf minimum(const uint8_t* scales, int64_t k, int64_t column, int v) const {
    if constexpr (S::has_minimum)
      return S::minimum(scales, k, column, shift, v);
    else
      return vf{};
  }
};
constexpr int kWholeRow = 40;  // the shift of one scale for all columns

constexpr int group_shift(Format format) {
  const int group = layout_of(format).group;
  return group == 0 ? kWholeRow : group == 16 ? 4 : group == 32 ? 5 : group == 64 ? 6 : 7;
}

// Calls body with the format as a type; false if it is a dense one.
template <class Body>
FASTLLM_INLINE bool with_format(Format format, const Body& body) {
  const int shift = group_shift(format);
  switch (format) {
    case Format::q4_0:
    case Format::int4_g32:
    case Format::int4_g64:
    case Format::int4_g128: return body(Quantized<Nibbles<8>, HalfScales>{shift}), true;
    case Format::q4_1: return body(Quantized<Nibbles<0>, HalfMinimums>{shift}), true;
    case Format::int4_asym_g32:
    case Format::int4_asym_g64:
    case Format::int4_asym_g128: return body(Quantized<Nibbles<0>, HalfZeros>{shift}), true;
    case Format::q5_0: return body(Quantized<FiveBits<16>, HalfScales>{shift}), true;
    case Format::q5_1: return body(Quantized<FiveBits<0>, HalfMinimums>{shift}), true;
    case Format::q8_0: return body(Quantized<SignedBytes, HalfScales>{shift}), true;
    case Format::q4_k: return body(Quantized<Nibbles<0>, SuperScales>{shift}), true;
    case Format::q5_k: return body(Quantized<FiveBits<0>, SuperScales>{shift}), true;
    case Format::q6_k: return body(Quantized<SixBits, SuperScales6>{shift}), true;
    case Format::int8: return body(Quantized<SignedBytes, FloatScales>{shift}), true;
    case Format::nf4: return body(Quantized<NormalFloat, FloatScales>{shift}), true;
    case Format::nf4_dq: return body(Quantized<NormalFloat, DoubleScales>{shift}), true;
    case Format::fp8:
    case Format::fp8_block: return body(Quantized<Float8, FloatScales>{shift}), true;
    case Format::bf16:
    case Format::f32: return false;
  }
  return false;
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
