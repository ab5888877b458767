// Every native op: its argument struct (plain pointers and numbers: a graph keeps a copy), the
// function that checks tensors and fills it, and its place in the kernel table. Adding an op: a
// struct and a *_args function in an ops_*.h, its checks in api/<op>.cpp, its kernel in
// cpu/<op>.cpp, a row here and in cpu/kernels.cpp, a line in bindings.cpp.
#pragma once
#include "ops_core.h"
#include "ops_moe.h"
#include "ops_quant.h"
#include "ops_quantize.h"

namespace fastllm {

struct Kernels {
  Kernel<RmsNormArgs>* rms_norm;
  Kernel<RmsNormBackwardArgs>* rms_norm_backward;
  Kernel<RopeArgs>* rope;
  Kernel<SwigluArgs>* swiglu;
  Kernel<SwigluBackwardArgs>* swiglu_backward;
  Kernel<AppendKvArgs>* append_kv;
  Kernel<AppendMlaArgs>* append_mla;
  Kernel<RopeAppendKvArgs>* rope_append_kv;
  Kernel<AttentionArgs>* attention;
  Kernel<MlaAttentionArgs>* mla_attention;
  Kernel<PagedAttentionArgs>* paged_attention;
  Kernel<AttentionBackwardArgs>* attention_backward;
  Kernel<QuantMatmulArgs>* quant_matmul;
  Kernel<FinishedProductArgs>* finished_product;
  Kernel<FinishProductArgs>* finish_product;
  Kernel<QuantMatmulInputGradArgs>* quant_matmul_input_grad;
  Kernel<LinearArgs>* linear;
  Kernel<HeadLinearArgs>* head_linear;
  Kernel<EmbeddingArgs>* embedding;
  Kernel<EmbeddingBackwardArgs>* embedding_backward;
  Kernel<AdamwStepArgs>* adamw_step;
  Kernel<SumOfSquaresArgs>* sum_of_squares;
  Kernel<PackArgs>* pack;
  Kernel<UnpackArgs>* unpack;
  Kernel<QuantizeArgs>* quantize;
  Kernel<DequantizeArgs>* dequantize;
  Kernel<LogProbsArgs>* log_probs;
  Kernel<TopLogProbsArgs>* top_log_probs;
  Kernel<SamplingArgs>* sampling;
  Kernel<LossRowsArgs>* loss_rows;
  Kernel<KlRowsArgs>* kl_rows;
  Kernel<GradientProductArgs>* gradient_product;
  Kernel<ColumnSumsArgs>* column_sums;
  Kernel<MoeGateArgs>* moe_gate;
  Kernel<MoeGateBackwardArgs>* moe_gate_backward;
  Kernel<MoeDispatchArgs>* moe_dispatch;
  Kernel<MoeArgs>* moe;
  Kernel<MoeArgs>* quant_moe;
  Kernel<GroupedMatmulArgs>* grouped_matmul;
  Kernel<GroupedWeightGradArgs>* grouped_weight_grad;
  Kernel<MoeBackwardArgs>* moe_backward;
  Kernel<QuantMoeBackwardArgs>* quant_moe_backward;
};

namespace generic {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace fastllm
