#include "api/experts.h"
#include "common/check.h"
#include "ops.h"

namespace fastllm {
namespace {

bool is_list(const Tensor& t, int64_t n) {
  return t.ndim == 1 && t.dtype == DType::i32 && t.contiguous() && t.shape[0] == n;
}
bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return t.ndim == 2 && t.shape[0] == rows && t.shape[1] == columns;
}
bool is_bias(const Tensor& t, int64_t experts, int64_t n) {
  return is_float(t) && t.contiguous() && is_matrix(t, experts, n);
}

// What both ops check the same way; the weights are filled in by their callers.
MoeArgs layer(const char* op, const Tensor& y, const Tensor& pre, const Tensor& x,
              const Tensor& weights, const Tensor& offsets, const Tensor& slots,
              const Tensor& gate_up_bias, const Tensor& down_bias, const Tensor& base,
              int64_t gating, const Tensor& scratch, int64_t experts, int64_t inner) {
  check_rows(x, op);
  const int64_t tokens = x.shape[0], hidden = x.shape[1];
  check(weights.ndim == 2 && weights.dtype == DType::f32 && weights.contiguous() &&
            weights.shape[0] == tokens,
        op, "weights must be contiguous f32 [tokens, k]");
  const int64_t count = weights.numel();
  check(count < INT32_MAX && is_list(slots, count) && is_list(offsets, experts + 1), op,
        "slots and offsets must be contiguous i32 [tokens * k] and [experts + 1]");
  check(is_float(y) && y.contiguous() && is_matrix(y, tokens, hidden), op,
        "y must be f32 or bf16, contiguous, shaped like x");
  check(pre.dtype == x.dtype && pre.contiguous() &&
            (is_matrix(pre, count, 2 * inner) || is_matrix(pre, 0, 2 * inner)),
        op, "pre must be contiguous [tokens * k, 2 inner] in the dtype of x, or hold no rows");
  check(!gate_up_bias.given() || is_bias(gate_up_bias, experts, 2 * inner), op,
        "gate_up_bias must be f32 or bf16, contiguous, [experts, 2 inner]");
  check(!down_bias.given() || is_bias(down_bias, experts, hidden), op,
        "down_bias must be f32 or bf16, contiguous, [experts, hidden]");
  check(
      !base.given() || (is_float(base) && is_matrix(base, tokens, hidden) && rows_contiguous(base)),
      op, "base must be f32 or bf16 shaped like x, rows contiguous");
  check(scratch.given(), op, "scratch is missing");
  check_scratch(scratch, moe_scratch(tokens, hidden, count, inner), op);
  return {.y = y.data,
          .pre = pre.shape[0] ? pre.data : nullptr,
          .x = x.as<char>(),
          .weights = weights.as<float>(),
          .offsets = offsets.as<int32_t>(),
          .slots = slots.as<int32_t>(),
          .gate_up_bias = gate_up_bias.data,
          .down_bias = down_bias.data,
          .base = base.as<char>(),
          .scratch = scratch.as<char>(),
          .gate_up = {},
          .down = {},
          .tokens = tokens,
          .per_token = weights.shape[1],
          .experts = experts,
          .hidden = hidden,
          .inner = inner,
          .x_stride = x.stride[0],
          .base_stride = base.given() ? base.stride[0] : 0,
          .type = x.dtype,
          .y_type = y.dtype,
          .gate_up_bias_type = gate_up_bias.dtype,
          .down_bias_type = down_bias.dtype,
          .base_type = base.dtype,
          .gating = parse_gating(gating, op),
          .mode = Activation::fp32};
}

ExpertWeights plain(const Tensor& weight, bool paired) {
  const int64_t size = float_bytes(weight.dtype);
  const bool columns = in_columns(weight, paired);
  return {.data = weight.as<char>(),
          .scales = nullptr,
          .expert_bytes = weight.stride[0] * size,
          .expert_scales = 0,
          .row_bytes = weight.stride[columns ? 2 : 1] * size,
          .format = weight.dtype == DType::bf16 ? Format::bf16 : Format::f32,
          .columns = columns,
          .paired = paired};
}

ExpertWeights packed(const char* op, const Tensor& data, const Tensor& scales, int64_t code,
                     int64_t experts, int64_t n, int64_t k, DType x_type, Activation mode) {
  const ExpertWeights weights = packed_experts(data, scales, code, experts, n, k, op);
  const DType needed = is_dense(weights.format)   ? data.dtype
                       : mode == Activation::int8 ? x_type
                       : mode == Activation::bf16 ? DType::bf16
                                                  : DType::f32;
  check(x_type == needed, op, "x has another dtype than format and mode need");
  return weights;
}

}  // namespace

int64_t moe_scratch(int64_t tokens, int64_t hidden, int64_t count, int64_t inner) {
  return moe_scratch_parts(tokens, hidden, count, inner).bytes;
}

MoeArgs moe_args(Tensor y, Tensor pre, Tensor x, Tensor gate_up, Tensor down, Tensor weights,
                 Tensor offsets, Tensor slots, Tensor gate_up_bias, Tensor down_bias, Tensor base,
                 int64_t gating, bool paired, Tensor scratch) {
  const char* op = "moe";
  check_rows(x, op);
  check_experts(x, gate_up, down, paired, op);
  const int64_t experts = gate_up.shape[0], inner = gate_up.shape[1] / 2;
  MoeArgs a = layer(op, y, pre, x, weights, offsets, slots, gate_up_bias, down_bias, base, gating,
                    scratch, experts, inner);
  a.gate_up = plain(gate_up, paired);
  a.down = plain(down, false);
  return a;
}

MoeArgs quant_moe_args(Tensor y, Tensor pre, Tensor x, Tensor gate_up, Tensor gate_up_scales,
                       int64_t gate_up_format, Tensor down, Tensor down_scales, int64_t down_format,
                       int64_t inner, Tensor weights, Tensor offsets, Tensor slots,
                       Tensor gate_up_bias, Tensor down_bias, Tensor base, int64_t gating,
                       int64_t mode, Tensor scratch) {
  const char* op = "quant_moe";
  check_rows(x, op);
  check(gate_up.ndim >= 1 && inner >= 0, op, "gate_up must have a dimension of experts");
  check(mode >= 0 && mode <= 2, op, "unknown mode");
  const int64_t experts = gate_up.shape[0], hidden = x.shape[1];
  const Activation activation = static_cast<Activation>(mode);
  MoeArgs a = layer(op, y, pre, x, weights, offsets, slots, gate_up_bias, down_bias, base, gating,
                    scratch, experts, inner);
  a.mode = activation;
  a.gate_up = packed(op, gate_up, gate_up_scales, gate_up_format, experts, 2 * inner, hidden,
                     x.dtype, activation);
  a.down = packed(op, down, down_scales, down_format, experts, hidden, inner, x.dtype, activation);
  return a;
}

}  // namespace fastllm
