#include "api/gating.h"

namespace fastllm {

SwigluArgs swiglu_args(Tensor y, Tensor gate, Tensor up, int64_t gating) {
  const char* op = "swiglu";
  check(gate.ndim >= 1 && gate.ndim <= 3, op, "gate must have 1 to 3 dimensions here");
  check(is_float(gate) && up.dtype == gate.dtype && y.dtype == gate.dtype, op,
        "gate, up and y must share f32 or bf16");
  check(same_shape(gate, up) && same_shape(gate, y), op, "gate, up and y must share a shape");
  check(rows_contiguous(gate) && rows_contiguous(up) && y.contiguous(), op,
        "the last dimension of gate and up, and y, must be contiguous");
  return {.y = y.data,
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
