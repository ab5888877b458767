// Checks at the native door: Python has checked for people, this protects memory whatever it is
// given.
#pragma once
#include <stdexcept>
#include <string>

#include "common/tensor.h"

namespace fastllm {

inline void check(bool ok, const char* op, const char* what) {
  if (!ok) throw std::invalid_argument(std::string(op) + ": " + what);
}
inline bool is_float(const Tensor& t) { return t.dtype == DType::f32 || t.dtype == DType::bf16; }
inline bool is_stored_float(const Tensor& t) { return is_float(t) || t.dtype == DType::f16; }
inline bool rows_contiguous(const Tensor& t) {
  return t.ndim >= 1 && (t.inner_stride(1) == 1 || t.inner(1) <= 1);
}
inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

}  // namespace fastllm
