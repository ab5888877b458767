// Products with packed weights and what follows them in one call.
#pragma once
#include "ops_core.h"
#include "ops_moe.h"

namespace fastllm {

// With p = round_to_x(x @ W.T + bias): y = residual + p in fp32, or, the rows of W being those of
// gate and then those of up, y = round(act(p_gate) * p_up). Quantized formats; with a gated
// activation half of the rows of W must be a multiple of 16.
struct FinishedProductArgs {
  QuantMatmulArgs product;  // out.y: [m, n], or [m, n / 2] if gated; out.n: rows of W
  const float* residual;    // [m, n] contiguous, or null: gated
  Gating gating;            // silu or gelu_tanh
};
FinishedProductArgs finished_product_args(Tensor y, Tensor x, Tensor data, Tensor scales,
                                          int64_t format, int64_t n, Tensor bias,
                                          int64_t activation, Tensor scratch, Tensor residual,
                                          int64_t gating);

// The same of a product that is in memory already: dense formats, or gate and up that share a panel.
struct FinishProductArgs {
  void* y;                // [m, columns] contiguous; f32, or in the dtype of `product` if gated
  const void* product;    // [m, n] contiguous, rounded
  const float* residual;  // [m, n] contiguous, or null: gated
  DType type;
  Gating gating;
  int64_t m, columns;  // n, or n / 2 if gated
};
FinishProductArgs finish_product_args(Tensor y, Tensor product, Tensor residual, int64_t gating);

}  // namespace fastllm
