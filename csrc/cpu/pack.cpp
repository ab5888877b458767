// Brings a weight into panels of 16 interleaved rows, straight from a file's blocks: one pass, no
// temporary.
#include "cpu/packed.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// GGUF blocks are the scales (fp16 d, and m for q4_1) followed by the codes, already in groups of 4
// bytes.
template <class F>
void pack_panel(const PackArgs& a, int64_t g) {
  constexpr int head = 2 * F::scales, size = head + 4 * F::words;
  const int64_t blocks = a.k / kBlock;
  const uint8_t* rows = static_cast<const uint8_t*>(a.rows);
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* data = static_cast<uint8_t*>(a.data) + (g * blocks + b) * block_bytes<F>;
    uint16_t* scales = a.scales + (g * blocks + b) * block_scales<F>;
    for (int r = 0; r < kPanelRows; ++r) {
      const int64_t row = g * kPanelRows + r;
      uint8_t block[size] = {};
      if (row < a.n) __builtin_memcpy(block, rows + row * a.row_stride + b * size, size);
      for (int s = 0; s < F::scales; ++s)
        __builtin_memcpy(scales + s * kPanelRows + r, block + 2 * s, 2);
      for (int i = 0; i < F::words; ++i)
        __builtin_memcpy(data + (i * kPanelRows + r) * 4, block + head + 4 * i, 4);
    }
  }
}

FASTLLM_INLINE float source_value(const PackArgs& a, int64_t row, int64_t column) {
  if (row >= a.n || column >= a.k) return 0.f;
  const int64_t at = row * a.row_stride + column;
  if (a.rows_type == DType::f32) return static_cast<const float*>(a.rows)[at];
  const uint16_t bits = static_cast<const uint16_t*>(a.rows)[at];
  return a.rows_type == DType::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

void pack_dense_panel(const PackArgs& a, int64_t g) {
  const bool bf16 = a.format == Format::bf16;
  const int64_t pair = bf16 ? 2 : 1, steps = (a.k + pair - 1) / pair;
  const int64_t first = g * steps * kPanelRows * pair;
  for (int64_t step = 0; step < steps; ++step)
    for (int r = 0; r < kPanelRows; ++r)
      for (int64_t j = 0; j < pair; ++j) {
        const float v = source_value(a, g * kPanelRows + r, step * pair + j);
        const int64_t at = first + (step * kPanelRows + r) * pair + j;
        if (bf16)
          static_cast<uint16_t*>(a.data)[at] = f32_to_bf16(v);
        else
          static_cast<float*>(a.data)[at] = v;
      }
}

}  // namespace

void pack(const PackArgs& a, const Team& team) {
  const int64_t panels = (a.n + kPanelRows - 1) / kPanelRows;
  int64_t begin, end;
  my_share(team, panels, 1, &begin, &end);
  for (int64_t g = begin; g < end; ++g) switch (a.format) {
      case Format::q4_0: pack_panel<Q4_0>(a, g); break;
      case Format::q4_1: pack_panel<Q4_1>(a, g); break;
      case Format::q8_0: pack_panel<Q8_0>(a, g); break;
      default: pack_dense_panel(a, g);
    }
}

}  // namespace fastllm::FASTLLM_ISA
