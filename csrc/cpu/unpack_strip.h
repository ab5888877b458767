// Columns of a packed weight as panels of a right operand: the panels of the weight interleave its
// rows, over which the product sums.
#pragma once
#include "common/formats.h"
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {

// A weight of `n` rows and `k` columns, packed as fastllm/ops/packed_layout.py says.
struct PackedMatrix {
  const uint8_t *data, *scales;
  Format format;
  int64_t n, k;
};

// `count` panels of 16 columns (2 only at even ones) of all rows, dequantized and rounded to `type`,
// f32 or bf16 in pairs of rows. Compiled in unpack_strip.cpp, once for all who read packed weights
// so. `count` is at most kDenseStrip.
void unpack_strip(DType type, const PackedMatrix& w, int64_t panel, int count, uint32_t* panels);

}  // namespace fastllm::FASTLLM_ISA
