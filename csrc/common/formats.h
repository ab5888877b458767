// How weights are packed: what every format's data and scales hold for panels of interleaved rows.
// The layouts are described in fastllm/ops/packed_layout.py.
#pragma once
#include <cstdint>

#include "common/tensor.h"

namespace fastllm {

// The numbers are those of fastllm.ops.packed_layout.FORMATS.
enum class Format : uint8_t {
  q4_0,
  q4_1,
  q8_0,
  bf16,
  f32,
  q5_0,
  q5_1,
  q4_k,
  q5_k,
  q6_k,
  int4_g32,
  int4_g64,
  int4_g128,
  int4_asym_g32,
  int4_asym_g64,
  int4_asym_g128,
  int8,
  nf4,
  nf4_dq,
  fp8,
  fp8_block
};
constexpr int kFormats = 21;

// Functions are static: an inline one that is emitted in an ISA level could be the copy of all levels.
//
// A quantized format: codes in words of 4 bytes a block of 32 columns and row, scales under `group`
// columns (0: all of a row).
struct FormatLayout {
  int words;     // 0: dense
  int group;     // columns under one scale
  int columns;   // K is a multiple of this
  DType scales;  // u8: a record of mixed types, see `record`
  int sides;     // scales of a group: d, or d with m or z
  int record;    // bytes a row of a record: of 256 columns; -1: nf4_dq's, of a whole row
};

static constexpr FormatLayout layout_of(Format format) {
  switch (format) {
    case Format::q4_0:
    case Format::int4_g32: return {4, 32, 32, DType::f16, 1, 0};
    case Format::q4_1:
    case Format::int4_asym_g32: return {4, 32, 32, DType::f16, 2, 0};
    case Format::int4_g64: return {4, 64, 64, DType::f16, 1, 0};
    case Format::int4_g128: return {4, 128, 128, DType::f16, 1, 0};
    case Format::int4_asym_g64: return {4, 64, 64, DType::f16, 2, 0};
    case Format::int4_asym_g128: return {4, 128, 128, DType::f16, 2, 0};
    case Format::q5_0: return {5, 32, 32, DType::f16, 1, 0};
    case Format::q5_1: return {5, 32, 32, DType::f16, 2, 0};
    case Format::q8_0: return {8, 32, 32, DType::f16, 1, 0};
    case Format::q4_k: return {4, 32, 256, DType::u8, 2, 20};
    case Format::q5_k: return {5, 32, 256, DType::u8, 2, 20};
    case Format::q6_k: return {6, 16, 256, DType::u8, 1, 18};
    case Format::nf4: return {4, 64, 64, DType::f32, 1, 0};
    case Format::nf4_dq: return {4, 64, 64, DType::u8, 1, -1};
    case Format::int8:
    case Format::fp8: return {8, 0, 32, DType::f32, 1, 0};
    case Format::fp8_block: return {8, 128, 32, DType::f32, 1, 0};
    case Format::bf16: return {0, 0, 1, DType::bf16, 0, 0};
    case Format::f32: return {0, 0, 1, DType::f32, 0, 0};
  }
  return {0, 0, 1, DType::f32, 0, 0};
}

static constexpr bool is_dense(Format format) { return layout_of(format).words == 0; }

// Bytes of the codes and of the scales of one row of k columns; times R they are a panel's.
static constexpr int64_t row_code_bytes(Format format, int64_t k) {
  return k / 32 * layout_of(format).words * 4;
}
static constexpr int64_t row_scale_bytes(Format format, int64_t k) {
  const FormatLayout l = layout_of(format);
  if (l.words == 0) return 0;
  if (l.record > 0) return k / 256 * l.record;
  if (l.record < 0) return 4 + (k / 64 + 3) / 4 * 4;
  const int64_t groups = l.group == 0 ? 1 : (k + l.group - 1) / l.group;
  return groups * l.sides * (l.scales == DType::f16 ? 2 : 4);
}

}  // namespace fastllm
