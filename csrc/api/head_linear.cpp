#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

HeadLinearArgs head_linear_args(Tensor y, Tensor x, Tensor weight, Tensor tail) {
  const char* op = "head_linear";
  check(x.ndim == 3 && is_float(x) && rows_contiguous(x), op,
        "x must be f32 or bf16 [T, H, K] with contiguous K");
  check(weight.ndim == 3 && weight.dtype == x.dtype && weight.shape[0] == x.shape[1] &&
            weight.shape[2] == x.shape[2],
        op, "weight must be [H, N, K] with H, K and the dtype of x");
  const bool rows = rows_contiguous(weight);
  check(rows || weight.stride[1] == 1 || weight.shape[1] == 1, op,
        "the rows or the columns of weight must be contiguous");
  const int64_t tail_dim = tail.given() ? tail.inner(1) : 0;
  if (tail.given())
    check(tail.ndim == 3 && tail.dtype == x.dtype && rows_contiguous(tail) &&
              tail.shape[0] == x.shape[0] && tail.shape[1] == x.shape[1],
          op, "tail must be [T, H, P] of the dtype of x with contiguous P");
  check(y.ndim == 3 && y.dtype == x.dtype && y.contiguous() && y.shape[0] == x.shape[0] &&
            y.shape[1] == x.shape[1] && y.shape[2] == weight.shape[1] + tail_dim,
        op, "y must be contiguous [T, H, N + P] of the dtype of x");
  return {.y = y.as<char>(),
          .x = x.as<char>(),
          .weight = weight.as<char>(),
          .tail = tail.given() ? tail.as<char>() : nullptr,
          .type = x.dtype,
          .transposed = !rows,
          .tokens = x.shape[0],
          .heads = x.shape[1],
          .n = weight.shape[1],
          .k = x.shape[2],
          .tail_dim = tail_dim,
          .x_token_stride = x.stride[0],
          .x_head_stride = x.stride[1],
          .weight_head_stride = weight.stride[0],
          .weight_stride = rows ? weight.stride[1] : weight.stride[2],
          .tail_token_stride = tail.given() ? tail.stride[0] : 0,
          .tail_head_stride = tail.given() ? tail.stride[1] : 0};
}

}  // namespace fastllm
