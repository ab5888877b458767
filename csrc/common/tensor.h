// A borrowed view of a tensor: pointer, element type, sizes and strides in elements. Owns nothing.
#pragma once
#include <cstdint>

namespace fastllm {

enum class DType : uint8_t { f32, f64, bf16, f16, i8, u8, i32, i64, boolean };

struct Tensor {
  static constexpr int kMaxDims = 6;
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = -1;  // -1: no tensor was given (Python None)
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  bool given() const { return ndim >= 0; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // Size and stride counted from the last dimension: size(1) is the innermost.
  int64_t inner(int i) const { return i <= ndim ? shape[ndim - i] : 1; }
  int64_t inner_stride(int i) const { return i <= ndim ? stride[ndim - i] : 0; }
  bool contiguous() const {
    if (numel() == 0) return true;  // torch gives empty tensors strides of 1 where products give 0
    int64_t expect = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expect) return false;
      expect *= shape[i];
    }
    return true;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace fastllm
