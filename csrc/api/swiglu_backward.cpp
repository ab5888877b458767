#include "api/gating.h"

namespace fastllm {

SwigluBackwardArgs swiglu_backward_args(Tensor both, Tensor dy, Tensor gate, Tensor up,
                                        int64_t gating) {
  const char* op = "swiglu_backward";
  check(gate.ndim >= 1 && gate.ndim <= 3, op, "gate must have 1 to 3 dimensions here");
  check(is_float(gate) && up.dtype == gate.dtype && dy.dtype == gate.dtype &&
            both.dtype == gate.dtype,
        op, "gate, up, dy and the result must share f32 or bf16");
  check(same_shape(gate, up) && same_shape(gate, dy), op, "gate, up and dy must share a shape");
  check(rows_contiguous(gate) && rows_contiguous(up) && dy.contiguous(), op,
        "the last dimension of gate and up, and dy, must be contiguous");
  check(both.contiguous() && both.ndim == gate.ndim && both.inner(1) == 2 * gate.inner(1) &&
            both.inner(2) == gate.inner(2) && both.inner(3) == gate.inner(3),
        op, "the result must be contiguous and have twice the columns of gate");
  return {.both = both.data,
          .dy = dy.data,
          .gate = gate.data,
          .up = up.data,
          .dtype = gate.dtype,
          .gating = parse_gating(gating, op),
          .outer = gate.inner(3),
          .inner = gate.inner(2),
          .n = gate.inner(1),
          .gate_outer = gate.inner_stride(3),
          .gate_inner = gate.inner_stride(2),
          .up_outer = up.inner_stride(3),
          .up_inner = up.inner_stride(2)};
}

}  // namespace fastllm
