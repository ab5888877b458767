#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

RmsNormArgs rms_norm_args(Tensor y, Tensor x, Tensor weight, Tensor residual, Tensor h,
                          double eps) {
  const char* op = "rms_norm";
  check(x.ndim >= 1 && x.ndim <= 3, op, "x must have 1 to 3 dimensions here");
  check(is_float(x) && is_float(y) && is_float(weight), op, "x, y and weight must be f32 or bf16");
  check(same_shape(x, y) && y.contiguous(), op, "y must be contiguous and shaped like x");
  check(rows_contiguous(x), op, "the last dimension of x must be contiguous");
  check(weight.ndim == 1 && weight.contiguous() && weight.shape[0] == x.inner(1), op,
        "weight must be contiguous with one entry per column of x");
  check(residual.given() == h.given(), op, "residual and h go together");
  if (h.given()) {
    check(residual.dtype == DType::f32 && h.dtype == DType::f32, op, "residual and h must be f32");
    check(same_shape(residual, x) && same_shape(h, x) && residual.contiguous() && h.contiguous(),
          op, "residual and h must be contiguous and shaped like x");
  }
  return {.y = y.data,
          .x = x.data,
          .weight = weight.data,
          .residual = residual.as<float>(),
          .h = h.as<float>(),
          .y_type = y.dtype,
          .x_type = x.dtype,
          .weight_type = weight.dtype,
          .outer = x.inner(3),
          .inner = x.inner(2),
          .n = x.inner(1),
          .x_outer_stride = x.inner_stride(3),
          .x_inner_stride = x.inner_stride(2),
          .eps = static_cast<float>(eps)};
}

}  // namespace fastllm
