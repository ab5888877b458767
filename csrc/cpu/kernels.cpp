// The kernel table of one ISA level.
#include "ops.h"

namespace fastllm::FASTLLM_ISA {

Kernel<RmsNormArgs> rms_norm;
Kernel<RmsNormBackwardArgs> rms_norm_backward;
Kernel<RopeArgs> rope;
Kernel<SwigluArgs> swiglu;
Kernel<SwigluBackwardArgs> swiglu_backward;
Kernel<AppendKvArgs> append_kv;
Kernel<AppendMlaArgs> append_mla;
Kernel<RopeAppendKvArgs> rope_append_kv;
Kernel<AttentionArgs> attention;
Kernel<MlaAttentionArgs> mla_attention;
Kernel<PagedAttentionArgs> paged_attention;
Kernel<AttentionBackwardArgs> attention_backward;
Kernel<QuantMatmulArgs> quant_matmul;
Kernel<FinishedProductArgs> finished_product;
Kernel<FinishProductArgs> finish_product;
Kernel<QuantMatmulInputGradArgs> quant_matmul_input_grad;
Kernel<LinearArgs> linear;
Kernel<HeadLinearArgs> head_linear;
Kernel<EmbeddingArgs> embedding;
Kernel<EmbeddingBackwardArgs> embedding_backward;
Kernel<AdamwStepArgs> adamw_step;
Kernel<SumOfSquaresArgs> sum_of_squares;
Kernel<PackArgs> pack;
Kernel<UnpackArgs> unpack;
Kernel<QuantizeArgs> quantize;
Kernel<DequantizeArgs> dequantize;
Kernel<LogProbsArgs> log_probs;
Kernel<TopLogProbsArgs> top_log_probs;
Kernel<SamplingArgs> sampling;
Kernel<LossRowsArgs> loss_rows;
Kernel<KlRowsArgs> kl_rows;
Kernel<GradientProductArgs> gradient_product;
Kernel<ColumnSumsArgs> column_sums;
Kernel<MoeGateArgs> moe_gate;
Kernel<MoeGateBackwardArgs> moe_gate_backward;
Kernel<MoeDispatchArgs> moe_dispatch;
Kernel<MoeArgs> moe;
Kernel<MoeArgs> quant_moe;
Kernel<GroupedMatmulArgs> grouped_matmul;
Kernel<GroupedWeightGradArgs> grouped_weight_grad;
Kernel<MoeBackwardArgs> moe_backward;
Kernel<QuantMoeBackwardArgs> quant_moe_backward;

const Kernels kernels = {
    .rms_norm = rms_norm,
    .rms_norm_backward = rms_norm_backward,
    .rope = rope,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .append_kv = append_kv,
    .append_mla = append_mla,
    .rope_append_kv = rope_append_kv,
    .attention = attention,
    .mla_attention = mla_attention,
    .paged_attention = paged_attention,
    .attention_backward = attention_backward,
    .quant_matmul = quant_matmul,
    .finished_product = finished_product,
    .finish_product = finish_product,
    .quant_matmul_input_grad = quant_matmul_input_grad,
    .linear = linear,
    .head_linear = head_linear,
    .embedding = embedding,
    .embedding_backward = embedding_backward,
    .adamw_step = adamw_step,
    .sum_of_squares = sum_of_squares,
    .pack = pack,
    .unpack = unpack,
    .quantize = quantize,
    .dequantize = dequantize,
    .log_probs = log_probs,
    .top_log_probs = top_log_probs,
    .sampling = sampling,
    .loss_rows = loss_rows,
    .kl_rows = kl_rows,
    .gradient_product = gradient_product,
    .column_sums = column_sums,
    .moe_gate = moe_gate,
    .moe_gate_backward = moe_gate_backward,
    .moe_dispatch = moe_dispatch,
    .moe = moe,
    .quant_moe = quant_moe,
    .grouped_matmul = grouped_matmul,
    .grouped_weight_grad = grouped_weight_grad,
    .moe_backward = moe_backward,
    .quant_moe_backward = quant_moe_backward,
};

}  // namespace fastllm::FASTLLM_ISA
