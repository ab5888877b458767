#include "api/packed.h"
#include "common/check.h"
#include "ops_moe.h"

namespace fastllm {
namespace {

void check_offsets(const Tensor& offsets, int64_t experts, const char* op) {
  check(offsets.dtype == DType::i32 && offsets.ndim == 1 && offsets.contiguous() &&
            offsets.shape[0] == experts + 1,
        op, "offsets must be contiguous int32 [experts + 1]");
}

}  // namespace

GroupedMatmulArgs grouped_matmul_args(Tensor y, Tensor x, Tensor weight, Tensor offsets,
                                      Tensor bias, bool transposed) {
  const char* op = "grouped_matmul";
  check_rows(x, op);
  check(weight.ndim == 3 && weight.dtype == x.dtype && rows_contiguous(weight), op,
        "weight must have three dimensions and the dtype of x, rows contiguous");
  const int64_t m = x.shape[0], k = x.shape[1], experts = weight.shape[0];
  const int64_t n = weight.shape[transposed ? 2 : 1];
  check(weight.shape[transposed ? 1 : 2] == k, op, "weight and x must agree in their columns");
  check_offsets(offsets, experts, op);
  check(!bias.given() || (is_float(bias) && bias.ndim == 2 && rows_contiguous(bias) &&
                          bias.shape[0] == experts && bias.shape[1] == n),
        op, "bias must be f32 or bf16 [experts, n], rows contiguous");
  GroupedMatmulArgs args{.out = matmul_output(y, Tensor{}, m, n, op),
                         .x = x.data,
                         .weight = weight.as<char>(),
                         .offsets = offsets.as<int32_t>(),
                         .type = x.dtype,
                         .transposed = transposed,
                         .m = m,
                         .k = k,
                         .experts = experts,
                         .x_stride = x.stride[0],
                         .weight_stride = weight.stride[1],
                         .expert_bytes = weight.stride[0] * float_bytes(weight.dtype),
                         .bias_bytes = 0};
  if (bias.given()) {
    args.out.bias = bias.data;
    args.out.bias_type = bias.dtype;
    args.bias_bytes = bias.stride[0] * float_bytes(bias.dtype);
  }
  return args;
}

GroupedWeightGradArgs grouped_weight_grad_args(Tensor dweight, Tensor dy, Tensor x,
                                               Tensor offsets) {
  const char* op = "grouped_weight_grad";
  check_rows(x, op);
  check(dy.dtype == x.dtype && dy.ndim == 2 && rows_contiguous(dy) && dy.shape[0] == x.shape[0], op,
        "dy must be [m, n] in the dtype of x, rows contiguous");
  check(is_float(dweight) && dweight.ndim == 3 && dweight.contiguous() &&
            dweight.shape[1] == dy.shape[1] && dweight.shape[2] == x.shape[1],
        op, "the result must be contiguous f32 or bf16 [experts, n, k]");
  check_offsets(offsets, dweight.shape[0], op);
  return {.dweight = dweight.as<char>(),
          .dy = dy.data,
          .x = x.data,
          .offsets = offsets.as<int32_t>(),
          .dweight_type = dweight.dtype,
          .type = x.dtype,
          .m = x.shape[0],
          .n = dy.shape[1],
          .k = x.shape[1],
          .experts = dweight.shape[0],
          .dy_stride = dy.stride[0],
          .x_stride = x.stride[0]};
}

}  // namespace fastllm
