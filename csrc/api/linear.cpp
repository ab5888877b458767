#include "api/packed.h"
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

LinearArgs linear_args(Tensor y, Tensor x, Tensor weight, Tensor bias, Tensor scratch) {
  const char* op = "linear";
  check_rows(x, op);
  check(weight.ndim == 2 && rows_contiguous(weight) && weight.dtype == x.dtype, op,
        "weight must be [n, k] in the dtype of x, rows contiguous");
  check(weight.shape[1] == x.shape[1], op, "weight and x must have the same number of columns");
  check_scratch(scratch, prepared_bytes(x.shape[0], x.shape[1]), op);
  return {.out = matmul_output(y, bias, x.shape[0], weight.shape[0], op),
          .x = x.data,
          .weight = weight.data,
          .scratch = scratch.given() ? scratch.data : nullptr,
          .type = x.dtype,
          .m = x.shape[0],
          .k = x.shape[1],
          .x_stride = x.stride[0],
          .weight_stride = weight.stride[0]};
}

}  // namespace fastllm
