#include "common/check.h"
#include "ops_core.h"

namespace fastllm {
namespace {

int64_t chunks_of(int64_t rows, int64_t n) {
  const int64_t chunk = rms_norm_chunk_rows(n);
  return (rows + chunk - 1) / chunk;
}

void check_row_tensor(const Tensor& t, const Tensor& x, bool f32, const char* op,
                      const char* what) {
  check(f32 ? t.dtype == DType::f32 : is_float(t), op, what);
  check(same_shape(t, x) && t.contiguous(), op, what);
}

}  // namespace

int64_t rms_norm_backward_scratch(int64_t rows, int64_t n) { return chunks_of(rows, n) * n; }

RmsNormBackwardArgs rms_norm_backward_args(Tensor dx, Tensor dresidual, Tensor dweight,
                                           Tensor partial, Tensor dy, Tensor dh, Tensor x,
                                           Tensor weight, double eps) {
  const char* op = "rms_norm_backward";
  check(x.ndim >= 1 && x.ndim <= 3, op, "x must have 1 to 3 dimensions here");
  check(is_float(x) && is_float(weight), op, "x and weight must be f32 or bf16");
  check(rows_contiguous(x), op, "the last dimension of x must be contiguous");
  check(weight.ndim == 1 && weight.contiguous() && weight.shape[0] == x.inner(1), op,
        "weight must be contiguous with one entry per column of x");
  check_row_tensor(dy, x, false, op, "dy must be f32 or bf16, contiguous and shaped like x");
  if (dx.given())
    check_row_tensor(dx, x, false, op, "dx must be f32 or bf16, contiguous and shaped like x");
  if (dresidual.given())
    check_row_tensor(dresidual, x, true, op, "dresidual must be f32, contiguous, shaped like x");
  if (dh.given()) check_row_tensor(dh, x, true, op, "dh must be f32, contiguous, shaped like x");
  check(dweight.given() == partial.given(), op, "dweight and partial go together");
  const int64_t n = x.inner(1), rows = x.inner(3) * x.inner(2);
  if (dweight.given()) {
    check(is_float(dweight) && dweight.contiguous() && same_shape(dweight, weight), op,
          "dweight must be f32 or bf16, contiguous and shaped like weight");
    check(partial.dtype == DType::f32 && partial.contiguous() &&
              partial.numel() >= rms_norm_backward_scratch(rows, n),
          op, "partial is too small");
  }
  return {.dx = dx.data,
          .dresidual = dresidual.as<float>(),
          .dweight = dweight.data,
          .partial = partial.as<float>(),
          .dy = dy.data,
          .dh = dh.as<float>(),
          .x = x.data,
          .weight = weight.data,
          .dx_type = dx.dtype,
          .dweight_type = dweight.dtype,
          .dy_type = dy.dtype,
          .x_type = x.dtype,
          .weight_type = weight.dtype,
          .outer = x.inner(3),
          .inner = x.inner(2),
          .n = n,
          .x_outer_stride = x.inner_stride(3),
          .x_inner_stride = x.inner_stride(2),
          .eps = static_cast<float>(eps)};
}

}  // namespace fastllm
