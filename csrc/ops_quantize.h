// Dense weights to packed ones and back: argument structs, and the functions that check tensors and
// fill them.
#pragma once
#include <cstdint>

#include "common/formats.h"
#include "common/team.h"
#include "common/tensor.h"

namespace fastllm {

// A dense weight [n, k] into panels of a quantized format (see cpu/quantize.cpp). `bad` starts as
// (n, n) and becomes the first row that is not finite, and the first one of which a scale is too
// large for fp16.
struct QuantizeArgs {
  void *data, *scales;
  int64_t* bad;
  const void* w;            // [n, k], rows contiguous
  const float* importance;  // of the columns, or of every value; or null
  DType type;               // of w
  Format format;
  int64_t n, k, stride, importance_stride;  // importance_stride 0: one row for all
};
QuantizeArgs quantize_args(Tensor data, Tensor scales, Tensor bad, Tensor w, Tensor importance,
                           int64_t format);

// The values of a weight in panels of a quantized format, rounded once.
struct DequantizeArgs {
  void* y;  // [n, k] contiguous
  const void *data, *scales;
  DType type;  // of y
  Format format;
  int64_t n, k;
};
DequantizeArgs dequantize_args(Tensor y, Tensor data, Tensor scales, int64_t format);

}  // namespace fastllm
