// Checks of experts' weights that several ops share.
#pragma once
#include <utility>

#include "api/gating.h"
#include "api/packed.h"
#include "ops_moe.h"

namespace fastllm {

// [experts, n, k] seen as [experts, k, n].
inline Tensor transposed(Tensor t) {
  std::swap(t.shape[1], t.shape[2]);
  std::swap(t.stride[1], t.stride[2]);
  return t;
}

// Whether a weight [experts, n, k] lies in columns; one whose gates and ups alternate always does.
inline bool in_columns(const Tensor& weight, bool paired = false) {
  return paired || !rows_contiguous(weight);
}

// gate_up [experts, 2 inner, hidden] and down [experts, hidden, inner], for x [m, hidden]: each in
// rows or in columns.
inline void check_experts(const Tensor& x, const Tensor& gate_up, const Tensor& down, bool paired,
                          const char* op) {
  check(gate_up.ndim == 3 && gate_up.dtype == x.dtype && gate_up.shape[1] % 2 == 0 &&
            gate_up.shape[2] == x.shape[1],
        op, "gate_up must be [experts, 2 inner, hidden] in the dtype of x");
  check(down.ndim == 3 && down.dtype == x.dtype && down.shape[0] == gate_up.shape[0] &&
            down.shape[1] == x.shape[1] && 2 * down.shape[2] == gate_up.shape[1],
        op, "down must be [experts, hidden, inner] in the dtype of x");
  check(!in_columns(gate_up, paired) || rows_contiguous(transposed(gate_up)), op,
        "gate_up must have contiguous rows, or columns; columns if gate and up alternate");
  check(!in_columns(down) || rows_contiguous(transposed(down)), op,
        "down must have contiguous rows, or columns");
}

// data and scales hold the packs of n rows of k columns of all experts.
inline ExpertWeights packed_experts(const Tensor& data, const Tensor& scales, int64_t code,
                                    int64_t experts, int64_t n, int64_t k, const char* op) {
  const Format format = parse_format(code, op);
  check(data.ndim >= 1 && scales.ndim >= 1 && data.shape[0] == experts &&
            scales.shape[0] == experts && data.contiguous() && scales.contiguous(),
        op, "data and scales must be contiguous, experts first");
  const auto one_expert = [](Tensor t) {
    for (int i = 1; i < t.ndim; ++i) t.shape[i - 1] = t.shape[i], t.stride[i - 1] = t.stride[i];
    t.ndim -= 1;
    return t;
  };
  if (experts) check_packed(one_expert(data), one_expert(scales), format, n, k, op);
  const int64_t size = data.dtype == DType::u8 ? 1 : float_bytes(data.dtype);
  const int64_t scale_bytes = scales.dtype == DType::u8 ? 1 : scales.dtype == DType::f32 ? 4 : 2;
  return {.data = data.as<char>(),
          .scales = scales.as<char>(),
          .expert_bytes = experts ? data.numel() / experts * size : 0,
          .expert_scales = experts ? scales.numel() / experts * scale_bytes : 0,
          .row_bytes = 0,
          .format = format};
}

}  // namespace fastllm
