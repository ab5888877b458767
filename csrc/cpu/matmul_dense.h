// The rows of x and the tiles of dense products, for packed weights and for panels packed on the
// way.
#pragma once
#include "cpu/matmul_float.h"
#include "cpu/matmul_tasks.h"

namespace fastllm::FASTLLM_ISA {

// 12 rows x 32 outputs: 24 accumulators, two weights and a broadcast fill the 32 registers of
// AVX-512.
#if defined(__AVX512F__)
constexpr int kDenseRows = 12, kDenseStrip = 2;
#elif defined(__AVX2__)
constexpr int kDenseRows = 6, kDenseStrip = 1;
#else
constexpr int kDenseRows = 2, kDenseStrip = 1;
#endif

#if defined(__AVX512BF16__)
using Bf16Dense = Bf16Pair;
#else
using Bf16Dense = Bf16Float;
#endif

template <class D>
struct DenseRows {
  static constexpr int rows = kDenseRows, strip = kDenseStrip, few = 4;
  static constexpr int64_t row_block = kRowBlockBytes;
  const void* x;
  DType x_type;
  int64_t m, k, x_stride;

  int64_t words() const { return (k + D::columns - 1) / D::columns; }
  int64_t row_bytes() const { return words() * D::steps * 4; }
  void prepare(const RowGroups& to, int64_t row) const {
    uint32_t* out = reinterpret_cast<uint32_t*>(to.group(row / to.width)) + row % to.width;
    if (row >= m) {
      for (int64_t i = 0; i < words() * D::steps; ++i) out[i * to.width] = 0;
    } else if constexpr (D::columns == 2) {
      prepare_dense<D>(static_cast<const uint16_t*>(x) + row * x_stride, k, out, to.width);
    } else {
      prepare_dense<D>(static_cast<const float*>(x) + row * x_stride, k, out, to.width);
    }
  }
};

}  // namespace fastllm::FASTLLM_ISA
