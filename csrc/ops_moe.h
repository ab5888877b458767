// The native ops of a mixture of experts: argument structs and the functions that check tensors and
// fill them.
#pragma once
#include "ops_core.h"

namespace fastllm {

// The experts of each token, their weights, and sums over tokens (see cpu/moe_gate.cpp). Tokens are
// taken in chunks; `partial` gets the sums of each where there are several.
struct MoeGateArgs {
  int32_t* ids;         // [tokens, k]; -1 in a row without a distribution
  float* weights;       // [tokens, k]
  int32_t* counts;      // [experts]
  float* score_sum;     // [experts]
  float* z_sum;         // one
  float* partial;       // moe_gate_scratch floats, or null with one chunk
  const float* logits;  // [tokens, experts], rows contiguous
  const float* bias;    // [experts], or null
  int64_t tokens, experts, k, stride, groups, kept_groups;
  float scale;
  bool sigmoid, top2, renormalize;
};
MoeGateArgs moe_gate_args(Tensor weights, Tensor ids, Tensor counts, Tensor score_sum, Tensor z_sum,
                          Tensor partial, Tensor logits, Tensor bias, bool sigmoid, int64_t groups,
                          int64_t kept_groups, bool top2, bool renormalize, double scale);
constexpr int64_t kGateChunk = 32;                          // tokens; 16 us of work at 256 experts
int64_t moe_gate_scratch(int64_t tokens, int64_t experts);  // floats of `partial`

// The gradient of the logits through the weights of the chosen experts and through the sums.
struct MoeGateBackwardArgs {
  float* dlogits;            // [tokens, experts] contiguous
  const float* logits;       // [tokens, experts], rows contiguous
  const int32_t* ids;        // [tokens, k]
  const float* d_weights;    // [tokens, k]
  const float* d_score_sum;  // [experts]
  const float* d_z_sum;      // one
  int64_t tokens, experts, k, stride;
  float scale;
  bool sigmoid, renormalize;
};
MoeGateBackwardArgs moe_gate_backward_args(Tensor dlogits, Tensor logits, Tensor ids,
                                           Tensor d_weights, Tensor d_score_sum, Tensor d_z_sum,
                                           bool sigmoid, bool renormalize, double scale);

// The slots of tokens sorted by expert, stable: a count, a sum, a scatter, in chunks of slots.
struct MoeDispatchArgs {
  int32_t* offsets;    // [experts + 1]
  int32_t* slots;      // [count]
  int32_t* counts;     // [chunks, experts]
  const int32_t* ids;  // [count]
  int64_t count, experts, first;
};
MoeDispatchArgs moe_dispatch_args(Tensor offsets, Tensor slots, Tensor counts, Tensor ids,
                                  int64_t first);
int64_t moe_dispatch_scratch(int64_t count, int64_t experts);  // int32 of `counts`
constexpr int64_t kDispatchChunk = 4096;                       // slots; one: nothing is shared

// The weights of all experts: in rows, in columns (transposed), or in panels of 16 rows.
struct ExpertWeights {
  const char *data, *scales;
  int64_t expert_bytes, expert_scales;  // bytes from one expert to the next
  int64_t row_bytes;                    // of rows or columns: from one to the next
  Format format;                        // of panels
  bool columns = false;                 // [k, n] lies there, not [n, k]
  bool paired = false;                  // of columns: gate and up alternate
};

// A layer of experts (see fastllm/ops/moe.py): y = the weighted sum of the experts of each token.
struct MoeArgs {
  void* y;               // [tokens, hidden] contiguous
  void* pre;             // [slots, 2 inner] contiguous, or null: not kept
  const char* x;         // [tokens, hidden], rows contiguous
  const float* weights;  // [tokens, per_token]
  const int32_t *offsets, *slots;
  const void *gate_up_bias, *down_bias;  // [experts, 2 inner], [experts, hidden], or null
  const char* base;                      // [tokens, hidden], rows contiguous, or null
  char* scratch;                         // moe_scratch bytes
  ExpertWeights gate_up, down;
  int64_t tokens, per_token, experts, hidden, inner, x_stride, base_stride;
  DType type, y_type, gate_up_bias_type, down_bias_type, base_type;  // type: of x, pre and weights
  Gating gating;
  Activation mode;  // of quantized weights
  int64_t count() const { return tokens * per_token; }
};
MoeArgs moe_args(Tensor y, Tensor pre, Tensor x, Tensor gate_up, Tensor down, Tensor weights,
                 Tensor offsets, Tensor slots, Tensor gate_up_bias, Tensor down_bias, Tensor base,
                 int64_t gating, bool paired, Tensor scratch);
MoeArgs quant_moe_args(Tensor y, Tensor pre, Tensor x, Tensor gate_up, Tensor gate_up_scales,
                       int64_t gate_up_format, Tensor down, Tensor down_scales, int64_t down_format,
                       int64_t inner, Tensor weights, Tensor offsets, Tensor slots,
                       Tensor gate_up_bias, Tensor down_bias, Tensor base, int64_t gating,
                       int64_t mode, Tensor scratch);

// The parts of a layer's scratch, each on a 64-byte boundary.
struct MoeScratch {
  int64_t rows;       // fp32 [count, hidden]: what the experts give, in sorted order
  int64_t activated;  // [count, inner] in the dtype of x
  int64_t row_of;     // int32 [count]: the row of each slot, or -1
  int64_t quantized;  // [tokens, hidden / 32] records of at most 44 bytes
  int64_t bytes;
};
constexpr MoeScratch moe_scratch_parts(int64_t tokens, int64_t hidden, int64_t count,
                                       int64_t inner) {
  const auto whole = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  MoeScratch s{};
  s.activated = whole(4 * count * hidden);
  s.row_of = s.activated + whole(4 * count * inner);
  s.quantized = s.row_of + whole(4 * count);
  s.bytes = s.quantized + whole(44 * tokens * (hidden / 32));
  return s;
}
int64_t moe_scratch(int64_t tokens, int64_t hidden, int64_t count, int64_t inner);
// Rows of experts: expert e owns the rows [offsets[e], offsets[e + 1]), which kernels clamp to what
// there is. Slot t * k + j is the j-th expert of token t.

// y[r] = x[r] @ weight[e].T + bias[e], or x[r] @ weight[e] if transposed, for the rows r of every
// expert e; other rows are zero.
struct GroupedMatmulArgs {
  MatmulOutput out;        // [m, n]; the bias is [experts, n]
  const void* x;           // [m, k], rows contiguous
  const char* weight;      // [experts, n, k], or [experts, k, n] if transposed; rows contiguous
  const int32_t* offsets;  // [experts + 1]
  DType type;              // of x and weight
  bool transposed;
  int64_t m, k, experts, x_stride, weight_stride;
  int64_t expert_bytes, bias_bytes;  // from one expert to the next
};
GroupedMatmulArgs grouped_matmul_args(Tensor y, Tensor x, Tensor weight, Tensor offsets,
                                      Tensor bias, bool transposed);

// dweight[e] = the sum of dy[r]' x[r] over the rows r of expert e, ascending.
struct GroupedWeightGradArgs {
  char* dweight;  // [experts, n, k] contiguous
  const void *dy, *x;
  const int32_t* offsets;
  DType dweight_type, type;  // type: of dy and x
  int64_t m, n, k, experts, dy_stride, x_stride;
};
GroupedWeightGradArgs grouped_weight_grad_args(Tensor dweight, Tensor dy, Tensor x, Tensor offsets);

// What both backward kernels of experts have, see fastllm/ops/moe_backward.py. P rows, k slots a
// token, n experts of width `inner`.
struct MoeRows {
  void* dx;        // [tokens, hidden] contiguous, or null: not wanted
  float* dw;       // [tokens, k], or null
  const void* dy;  // [tokens, hidden]
  const float* w;  // [tokens, k]
  const int32_t* offsets;
  const int32_t* slots;        // [slots_count]
  const void* pre;             // [slots_count, 2 inner] contiguous
  const char* down_bias;       // [experts, hidden], or null
  void* dpre;                  // [rows, 2 inner] contiguous
  void* weighted;              // [rows, inner]: the activation times w; or null: not wanted
  float* dx_rows;              // [rows, hidden], with dx
  int32_t* row_of;             // [tokens * k], with dx: the row of each slot, or -1
  DType type, down_bias_type;  // type: of dx, dy, pre, dpre, weighted
  Gating gating;
  int64_t tokens, per_token, hidden, inner, experts;
  int64_t rows;  // that dpre holds; rows past it are not read
  int64_t dy_stride, down_bias_stride;
  bool paired = false;  // gate and up alternate in dpre, as they do in the weight
};
struct MoeBackwardArgs {
  MoeRows rows;
  const void* x;                      // [tokens, hidden]
  const char *gate_up, *down;         // [experts, 2 inner, hidden], [experts, hidden, inner]
  char *dgate_up, *ddown;             // contiguous, or null
  float *dgate_up_bias, *ddown_bias;  // [experts, 2 inner], [experts, hidden], or null
  DType dgate_up_type, ddown_type;
  int64_t x_stride, gate_up_stride, down_stride, gate_up_expert, down_expert;
  bool gate_up_columns = false, down_columns = false;  // the weight and its gradient lie transposed
};
MoeBackwardArgs moe_backward_args(Tensor dx, Tensor dgate_up, Tensor ddown, Tensor dw,
                                  Tensor dgate_up_bias, Tensor ddown_bias, Tensor dy, Tensor x,
                                  Tensor gate_up, Tensor down, Tensor w, Tensor offsets,
                                  Tensor slots, Tensor pre, Tensor down_bias, Tensor dpre,
                                  Tensor weighted, Tensor dx_rows, Tensor row_of, int64_t gating,
                                  bool paired);

struct QuantMoeBackwardArgs {
  MoeRows rows;
  ExpertWeights gate_up, down;
};
QuantMoeBackwardArgs quant_moe_backward_args(Tensor dx, Tensor dw, Tensor dy, Tensor gate_up,
                                             Tensor gate_up_scales, int64_t gate_up_format,
                                             Tensor down, Tensor down_scales, int64_t down_format,
                                             Tensor w, Tensor offsets, Tensor slots, Tensor pre,
                                             Tensor down_bias, Tensor dpre, Tensor dx_rows,
                                             Tensor row_of, int64_t gating);

}  // namespace fastllm
