#include "api/packed.h"
#include "common/check.h"
#include "ops_quantize.h"

namespace fastllm {

QuantizeArgs quantize_args(Tensor data, Tensor scales, Tensor bad, Tensor w, Tensor importance,
                           int64_t format_code) {
  const char* op = "quantize";
  const Format format = parse_format(format_code, op);
  check(!is_dense(format), op, "the format must be a quantized one");
  check(is_stored_float(w) && w.ndim == 2 && rows_contiguous(w), op,
        "w must be f32, bf16 or f16 [n, k], rows contiguous");
  const int64_t n = w.shape[0], k = w.shape[1];
  check_packed(data, scales, format, n, k, op);
  check(bad.dtype == DType::i64 && bad.ndim == 1 && bad.shape[0] == 2 && bad.contiguous(), op,
        "bad must be two int64");
  const bool of_rows = importance.ndim == 2;
  check(!importance.given() || (importance.dtype == DType::f32 && rows_contiguous(importance) &&
                                importance.inner(1) == k &&
                                (of_rows ? importance.shape[0] == n : importance.ndim == 1)),
        op, "importance must be f32 [k] or [n, k], rows contiguous");
  return {.data = data.data,
          .scales = scales.data,
          .bad = bad.as<int64_t>(),
          .w = w.data,
          .importance = importance.given() ? importance.as<float>() : nullptr,
          .type = w.dtype,
          .format = format,
          .n = n,
          .k = k,
          .stride = w.stride[0],
          .importance_stride = of_rows ? importance.stride[0] : 0};
}

DequantizeArgs dequantize_args(Tensor y, Tensor data, Tensor scales, int64_t format_code) {
  const char* op = "dequantize";
  const Format format = parse_format(format_code, op);
  check(!is_dense(format), op, "the format must be a quantized one");
  check(is_stored_float(y) && y.ndim == 2 && y.contiguous(), op,
        "y must be f32, bf16 or f16 [n, k], contiguous");
  check_packed(data, scales, format, y.shape[0], y.shape[1], op);
  return {.y = y.data,
          .data = data.data,
          .scales = scales.data,
          .type = y.dtype,
          .format = format,
          .n = y.shape[0],
          .k = y.shape[1]};
}

}  // namespace fastllm
