#include "api/packed.h"
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

QuantMatmulInputGradArgs quant_matmul_input_grad_args(Tensor dx, Tensor dy, Tensor data,
                                                      Tensor scales, int64_t format_code,
                                                      Tensor scratch) {
  const char* op = "quant_matmul_input_grad";
  const Format format = parse_format(format_code, op);
  check(!is_dense(format), op, "the format must be a quantized one");
  check(is_float(dy) && dy.ndim == 2 && rows_contiguous(dy), op,
        "dy must be f32 or bf16 [m, n], rows contiguous");
  check(dx.ndim == 2, op, "dx must be [m, k]");
  const int64_t m = dy.shape[0], n = dy.shape[1], k = dx.shape[1];
  check_packed(data, scales, format, n, k, op);
  check_scratch(scratch, prepared_bytes(m, n), op);
  return {.out = matmul_output(dx, Tensor{}, m, k, op),
          .dy = dy.data,
          .data = data.data,
          .scales = scales.data,
          .scratch = scratch.given() ? scratch.data : nullptr,
          .type = dy.dtype,
          .format = format,
          .m = m,
          .n = n,
          .dy_stride = dy.stride[0]};
}

}  // namespace fastllm
