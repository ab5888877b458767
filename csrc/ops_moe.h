// The native ops of a mixture of experts: argument structs and the functions that check tensors and
// fill them.
#pragma once
#include "ops_core.h"

namespace fastllm {

// How gate and up of an expert become one value (see cpu/gated_activation.h); the order is that of
// fastllm/ops/gated_activation.py.
enum class Gating : uint8_t { silu, gelu, gelu_tanh, swiglu_oai };

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
MoeGateArgs moe_gate_args(Tensor ids, Tensor weights, Tensor counts, Tensor score_sum, Tensor z_sum,
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

}  // namespace fastllm
