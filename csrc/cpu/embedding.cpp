// Rows of a dense or packed table, one rounding. Bound by memory; an id outside the table gives
// zeros.
#include "cpu/packed.h"
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

template <class F, class Y>
void packed_row(const EmbeddingArgs& a, int64_t row, Y* y) {
  const int64_t blocks = a.k / kBlock, first = row / kPanelRows * blocks, lane = row % kPanelRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* data =
        static_cast<const uint8_t*>(a.data) + (first + b) * block_bytes<F> + lane * 4;
    const uint16_t* scales = a.scales + (first + b) * block_scales<F> + lane;
    const float d = f16_to_f32(scales[0]);
    const float minimum = F::scales == 2 ? f16_to_f32(scales[kPanelRows]) : 0.f;
    for (int c = 0; c < kBlock; ++c) {
      int code;
      if constexpr (F::nibbles) {
        const uint8_t byte = data[c % 16 / 4 * 4 * kPanelRows + c % 4];
        code = (c < 16 ? byte & 15 : byte >> 4) - F::offset;
      } else {
        code = static_cast<int8_t>(data[c / 4 * 4 * kPanelRows + c % 4]);
      }
      const float value = static_cast<float>(code) * d;
      store1(y + b * kBlock + c, F::scales == 2 ? value + minimum : value);
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
  } else {
    switch (a.format) {
      case Format::q4_0: return packed_row<Q4_0>(a, row, y);
      case Format::q4_1: return packed_row<Q4_1>(a, row, y);
      case Format::q8_0: return packed_row<Q8_0>(a, row, y);
      default: return packed_dense_row(a, row, y);
    }
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
