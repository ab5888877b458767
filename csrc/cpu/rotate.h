// The rotation of one head, shared by rope and rope_append_kv so that both give the same bits.
#pragma once
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {

// y = x with its first 2 * half dimensions rotated. Two products and one sum, each rounded: no fma,
// as in the reference.
template <class T>
FASTLLM_INLINE void rotate_head(T* y, const T* x, const float* cos, const float* sin, int64_t half,
                                int64_t dim) {
  int64_t i = 0;
  for (; i + VL <= half; i += VL) {
    const vf c = vload(cos + i), s = vload(sin + i);
    const vf x1 = load(x + i), x2 = load(x + half + i);
    store(y + i, x1 * c - x2 * s);
    store(y + half + i, x2 * c + x1 * s);
  }
  for (; i < half; ++i) {
    const float x1 = load1(x + i), x2 = load1(x + half + i);
    store1(y + i, x1 * cos[i] - x2 * sin[i]);
    store1(y + half + i, x2 * cos[i] + x1 * sin[i]);
  }
  for (i = 2 * half; i < dim; ++i) y[i] = x[i];
}

FASTLLM_INLINE int64_t table_row(int32_t position, int64_t rows) {
  return position < 0 ? 0 : position >= rows ? rows - 1 : position;
}

}  // namespace fastllm::FASTLLM_ISA
