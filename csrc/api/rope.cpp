#include "api/rope.h"

#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

void check_rope_tables(const char* op, const Tensor& positions, const Tensor& cos,
                       const Tensor& sin, int64_t tokens, int64_t dim) {
  check(positions.ndim == 1 && positions.dtype == DType::i32 && positions.contiguous() &&
            positions.shape[0] == tokens,
        op, "positions must be contiguous int32, one per token");
  check(cos.ndim == 2 && cos.dtype == DType::f32 && cos.contiguous() && 2 * cos.shape[1] <= dim, op,
        "cos must be contiguous f32 [positions, R/2] with R at most the head dim");
  check(sin.dtype == DType::f32 && sin.contiguous() && same_shape(sin, cos), op,
        "sin must be contiguous f32 shaped like cos");
  check(cos.shape[0] > 0 || tokens == 0, op, "the tables have no rows");
}

RopeArgs rope_args(Tensor y, Tensor x, Tensor positions, Tensor cos, Tensor sin) {
  const char* op = "rope";
  check(x.ndim == 3 && is_stored_float(x) && rows_contiguous(x), op,
        "x must be f32, bf16 or f16 [T, H, D] with contiguous D");
  check(same_shape(x, y) && y.dtype == x.dtype && y.contiguous(), op,
        "y must be contiguous, shaped and typed like x");
  check_rope_tables(op, positions, cos, sin, x.shape[0], x.shape[2]);
  return {.y = y.data,
          .x = x.data,
          .positions = positions.as<int32_t>(),
          .cos = cos.as<float>(),
          .sin = sin.as<float>(),
          .dtype = x.dtype,
          .tokens = x.shape[0],
          .heads = x.shape[1],
          .dim = x.shape[2],
          .half = cos.shape[1],
          .table_rows = cos.shape[0],
          .x_token_stride = x.stride[0],
          .x_head_stride = x.stride[1]};
}

}  // namespace fastllm
