// Rows of a dense or packed table, one rounding. Bound by memory; an id outside the table gives
// zeros.
#include "cpu/four_words.h"
#include "cpu/quant_codes.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

FASTLLM_INLINE int64_t id_at(const EmbeddingArgs& a, int64_t i) {
  return a.ids_type == DType::i64 ? static_cast<const int64_t*>(a.ids)[i]
                                  : static_cast<const int32_t*>(a.ids)[i];
}

FASTLLM_INLINE float dense_value(const EmbeddingArgs& a, int64_t at) {
  if (a.data_type == DType::f32) return static_cast<const float*>(a.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(a.data)[at];
  return a.data_type == DType::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

template <class Y>
void dense_row(const EmbeddingArgs& a, int64_t row, Y* y) {
  const int64_t at = row * a.row_stride;
  for (int64_t c = 0; c < a.k; ++c) store1(y + c, dense_value(a, at + c));
}

template <class Y>
void packed_dense_row(const EmbeddingArgs& a, int64_t row, Y* y) {
  const int64_t pair = a.format == Format::bf16 ? 2 : 1;
  const int64_t first = row / kPanelRows * kPanelRows * a.k + row % kPanelRows * pair;
  for (int64_t c = 0; c < a.k; ++c)
    store1(y + c, dense_value(a, first + c / pair * kPanelRows * pair + c % pair));
}

// The stored codes of 32 columns of one row, whose words lie a panel's rows apart.
template <class C>
FASTLLM_INLINE void stored_codes(const uint8_t* words, uint8_t* codes) {
  uint8_t row[C::words * 4];
  for (int i = 0; i < C::words; ++i) __builtin_memcpy(row + 4 * i, words + 4 * i * kPanelRows, 4);
  if constexpr (C::words == 8) {
    __builtin_memcpy(codes, row, 32);
    return;
  }
  v4 low = load_words(row) & kLow, high = load_words(row) >> 4 & kLow;
  if constexpr (C::words == 5) {
    const v4 bits = load_word(row + 16) - v4{};
    low |= (bits >> kIndex & 0x01010101) << 4;
    high |= (bits >> (4 + kIndex) & 0x01010101) << 4;
  } else if constexpr (C::words == 6) {
    low |= ((load_word(row + 16) - v4{}) >> (2 * kIndex) & 0x03030303) << 4;
    high |= ((load_word(row + 20) - v4{}) >> (2 * kIndex) & 0x03030303) << 4;
  }
  store_words(codes, low);
  store_words(codes + 16, high);
}
// VL stored codes as they are worth without a scale.
template <class C>
FASTLLM_INLINE vf code_values(const uint8_t* codes) {
  if constexpr (__is_same(C, NormalFloat)) {
    vi bits;
    for (int i = 0; i < VL; ++i) bits[i] = kNormalFloat[codes[i] & 15] << 16;
    return vbits(bits);
  } else if constexpr (__is_same(C, Float8)) {
    return float8_value(vload_u8(codes));
  } else if constexpr (C::is_signed) {
    return __builtin_convertvector(vload_i8(codes), vf);
  } else {
    return __builtin_convertvector(vload_u8(codes) - C::offset, vf);
  }
}

template <class F, class Y>
void packed_row(const EmbeddingArgs& a, const F& format, int64_t row, Y* y) {
  using C = typename F::Codes;
  const int64_t panel = row / kPanelRows, lane = row % kPanelRows, v = lane / VL;
  const auto* words =
      static_cast<const uint8_t*>(a.data) + panel * (a.k / kBlock) * F::block_bytes + lane * 4;
  const auto* scales =
      static_cast<const uint8_t*>(a.scales) + panel * row_scale_bytes(a.format, a.k) * kPanelRows;
  alignas(16) uint8_t codes[kBlock];
  for (int64_t c = 0; c < a.k; c += 16) {
    if (c % kBlock == 0) stored_codes<C>(words + c / kBlock * F::block_bytes, codes);
    const float d = format.d(scales, a.k, c, v)[lane % VL];
    const float minimum = format.minimum(scales, a.k, c, v)[lane % VL];
    for (int i = 0; i < 16; i += VL) {
      vf value = code_values<C>(codes + c % kBlock + i) * d;
      if constexpr (F::Scales::has_minimum) value = value + minimum;
      store(y + c + i, value);
    }
  }
}

template <class Y>
void one_row(const EmbeddingArgs& a, int64_t i) {
  Y* y = static_cast<Y*>(a.y) + i * a.k;
  const int64_t row = id_at(a, i);
  if (row < 0 || row >= a.n) {
    for (int64_t c = 0; c < a.k; ++c) y[c] = Y{};
  } else if (!a.packed) {
    dense_row(a, row, y);
  } else if (is_dense(a.format)) {
    packed_dense_row(a, row, y);
  } else {
    with_format(a.format, [&](auto format) { packed_row(a, format, row, y); });
  }
}

}  // namespace

void embedding(const EmbeddingArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, a.count, 1, &begin, &end);
  dispatch_float(a.y_type, [&](auto y) {
    for (int64_t i = begin; i < end; ++i) one_row<decltype(y)>(a, i);
  });
}

}  // namespace fastllm::FASTLLM_ISA
