#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

int64_t sum_of_squares_scratch(int64_t count) {
  return (count + kSquaresChunk - 1) / kSquaresChunk;
}

SumOfSquaresArgs sum_of_squares_args(Tensor total, Tensor partial, Tensor x) {
  const char* op = "sum_of_squares";
  check(x.given() && is_float(x) && x.contiguous(), op, "x must be contiguous f32 or bf16");
  check(total.dtype == DType::f32 && total.numel() == 1 && total.given(), op,
        "total must be one f32 value");
  check(partial.dtype == DType::f32 && partial.contiguous() && partial.given() &&
            partial.numel() >= sum_of_squares_scratch(x.numel()),
        op, "partial is too small");
  return {.total = total.as<float>(),
          .partial = partial.as<float>(),
          .x = x.data,
          .dtype = x.dtype,
          .count = x.numel()};
}

}  // namespace fastllm
