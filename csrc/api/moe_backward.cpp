#include "api/experts.h"
#include "common/check.h"
#include "ops_moe.h"

namespace fastllm {
namespace {

struct Sizes {
  int64_t tokens, per_token, hidden, inner, experts;
};

// What both ops get of the tokens; `type` is that of dy, pre and everything made of them.
MoeRows moe_rows(const char* op, Sizes n, Tensor dx, Tensor dw, Tensor dy, Tensor w, Tensor offsets,
                 Tensor slots, Tensor pre, Tensor down_bias, Tensor dpre, Tensor weighted,
                 Tensor dx_rows, Tensor row_of, int64_t gating) {
  const DType type = dy.dtype;
  const int64_t count = n.tokens * n.per_token;
  check(w.dtype == DType::f32 && w.ndim == 2 && w.contiguous(), op,
        "the gate weights must be contiguous f32 [tokens, k]");
  check(count < (int64_t{1} << 31), op, "there must be fewer than 2^31 slots");
  check(offsets.dtype == DType::i32 && offsets.ndim == 1 && offsets.contiguous() &&
            offsets.shape[0] == n.experts + 1,
        op, "offsets must be contiguous int32 [experts + 1]");
  check(slots.dtype == DType::i32 && slots.ndim == 1 && slots.contiguous(), op,
        "slots must be contiguous int32");
  check(pre.dtype == type && pre.ndim == 2 && pre.contiguous() && pre.shape[1] == 2 * n.inner, op,
        "pre must be contiguous [rows, 2 inner] in the dtype of dy");
  check(dpre.dtype == type && dpre.ndim == 2 && dpre.contiguous() && dpre.shape[1] == 2 * n.inner,
        op, "dpre must be contiguous [rows, 2 inner] in the dtype of dy");
  const int64_t rows = dpre.shape[0];
  check(rows <= slots.shape[0] && rows <= pre.shape[0], op,
        "slots and pre must have the rows of dpre");
  check(!dx.given() || (dx.dtype == type && dx.ndim == 2 && dx.contiguous() &&
                        dx.shape[0] == n.tokens && dx.shape[1] == n.hidden),
        op, "dx must be contiguous [tokens, hidden] in the dtype of dy");
  check(dx.given() == dx_rows.given() && dx.given() == row_of.given(), op,
        "dx comes with its rows and the rows of slots");
  check(
      !dx.given() || (dx_rows.dtype == DType::f32 && dx_rows.contiguous() && dx_rows.ndim == 2 &&
                      dx_rows.shape[0] == rows && dx_rows.shape[1] == n.hidden &&
                      row_of.dtype == DType::i32 && row_of.contiguous() && row_of.numel() == count),
      op, "the rows of dx must be contiguous f32 [rows, hidden], those of slots int32");
  check(!dw.given() || (dw.dtype == DType::f32 && dw.contiguous() && dw.numel() == count), op,
        "the gradient of the gate weights must be contiguous f32 [tokens, k]");
  check(
      !weighted.given() || (weighted.dtype == type && weighted.contiguous() && weighted.ndim == 2 &&
                            weighted.shape[0] == rows && weighted.shape[1] == n.inner),
      op, "the weighted activations must be contiguous [rows, inner] in the dtype of dy");
  check(!down_bias.given() ||
            (is_float(down_bias) && down_bias.ndim == 2 && rows_contiguous(down_bias) &&
             down_bias.shape[0] == n.experts && down_bias.shape[1] == n.hidden),
        op, "down_bias must be f32 or bf16 [experts, hidden], rows contiguous");
  return {.dx = dx.data,
          .dw = dw.as<float>(),
          .dy = dy.data,
          .w = w.as<float>(),
          .offsets = offsets.as<int32_t>(),
          .slots = slots.as<int32_t>(),
          .pre = pre.data,
          .down_bias = down_bias.as<char>(),
          .dpre = dpre.data,
          .weighted = weighted.data,
          .dx_rows = dx_rows.as<float>(),
          .row_of = row_of.as<int32_t>(),
          .type = type,
          .down_bias_type = down_bias.dtype,
          .gating = parse_gating(gating, op),
          .tokens = n.tokens,
          .per_token = n.per_token,
          .hidden = n.hidden,
          .inner = n.inner,
          .experts = n.experts,
          .rows = rows,
          .dy_stride = dy.stride[0],
          .down_bias_stride =
              down_bias.given() ? down_bias.stride[0] * float_bytes(down_bias.dtype) : 0};
}

void check_gradient(const Tensor& grad, const Tensor& of, bool columns, const char* op) {
  if (!grad.given()) return;
  check(is_float(grad) && same_shape(grad, of), op,
        "a weight's gradient must be f32 or bf16, of the shape of the weight");
  check((columns ? transposed(grad) : grad).contiguous(), op,
        "a weight's gradient must be contiguous in the order of the weight");
}

void check_bias_gradient(const Tensor& grad, const Tensor& weight, const char* op) {
  check(!grad.given() || (grad.dtype == DType::f32 && grad.ndim == 2 && grad.contiguous() &&
                          grad.shape[0] == weight.shape[0] && grad.shape[1] == weight.shape[1]),
        op, "a bias's gradient must be contiguous f32 [experts, rows of the weight]");
}

}  // namespace

MoeBackwardArgs moe_backward_args(Tensor dx, Tensor dgate_up, Tensor ddown, Tensor dw,
                                  Tensor dgate_up_bias, Tensor ddown_bias, Tensor dy, Tensor x,
                                  Tensor gate_up, Tensor down, Tensor w, Tensor offsets,
                                  Tensor slots, Tensor pre, Tensor down_bias, Tensor dpre,
                                  Tensor weighted, Tensor dx_rows, Tensor row_of, int64_t gating,
                                  bool paired) {
  const char* op = "moe_backward";
  check_rows(x, op);
  check(dy.dtype == x.dtype && rows_contiguous(dy) && same_shape(dy, x), op,
        "dy must have the dtype and shape of x, rows contiguous");
  check_experts(x, gate_up, down, paired, op);
  const bool gate_up_columns = in_columns(gate_up, paired), down_columns = in_columns(down);
  check(w.ndim == 2 && w.shape[0] == x.shape[0], op, "the gate weights must be [tokens, k]");
  check_gradient(dgate_up, gate_up, gate_up_columns, op);
  check_gradient(ddown, down, down_columns, op);
  check_bias_gradient(dgate_up_bias, gate_up, op);
  check_bias_gradient(ddown_bias, down, op);
  check(!ddown.given() || weighted.given(), op,
        "the gradient of down needs the weighted activations");
  const Sizes n{x.shape[0], w.shape[1], x.shape[1], down.shape[2], down.shape[0]};
  const int64_t bytes = float_bytes(x.dtype);
  MoeRows rows = moe_rows(op, n, dx, dw, dy, w, offsets, slots, pre, down_bias, dpre, weighted,
                          dx_rows, row_of, gating);
  rows.paired = paired;
  return {.rows = rows,
          .x = x.data,
          .gate_up = gate_up.as<char>(),
          .down = down.as<char>(),
          .dgate_up = dgate_up.as<char>(),
          .ddown = ddown.as<char>(),
          .dgate_up_bias = dgate_up_bias.as<float>(),
          .ddown_bias = ddown_bias.as<float>(),
          .dgate_up_type = dgate_up.dtype,
          .ddown_type = ddown.dtype,
          .x_stride = x.stride[0],
          .gate_up_stride = gate_up.stride[gate_up_columns ? 2 : 1],
          .down_stride = down.stride[down_columns ? 2 : 1],
          .gate_up_expert = gate_up.stride[0] * bytes,
          .down_expert = down.stride[0] * bytes,
          .gate_up_columns = gate_up_columns,
          .down_columns = down_columns};
}

QuantMoeBackwardArgs quant_moe_backward_args(Tensor dx, Tensor dw, Tensor dy, Tensor gate_up,
                                             Tensor gate_up_scales, int64_t gate_up_format,
                                             Tensor down, Tensor down_scales, int64_t down_format,
                                             Tensor w, Tensor offsets, Tensor slots, Tensor pre,
                                             Tensor down_bias, Tensor dpre, Tensor dx_rows,
                                             Tensor row_of, int64_t gating) {
  const char* op = "quant_moe_backward";
  check_rows(dy, op);
  check(w.ndim == 2 && w.shape[0] == dy.shape[0], op, "the gate weights must be [tokens, k]");
  check(pre.ndim == 2 && pre.shape[1] % 2 == 0, op, "pre must be [rows, 2 inner]");
  const int64_t hidden = dy.shape[1], inner = pre.shape[1] / 2;
  const Sizes n{dy.shape[0], w.shape[1], hidden, inner, gate_up.ndim > 0 ? gate_up.shape[0] : 0};
  return {.rows = moe_rows(op, n, dx, dw, dy, w, offsets, slots, pre, down_bias, dpre, Tensor{},
                           dx_rows, row_of, gating),
          .gate_up = packed_experts(gate_up, gate_up_scales, gate_up_format, n.experts, 2 * inner,
                                    hidden, op),
          .down = packed_experts(down, down_scales, down_format, n.experts, hidden, inner, op)};
}

}  // namespace fastllm
