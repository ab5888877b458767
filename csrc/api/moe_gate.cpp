#include "common/check.h"
#include "ops_moe.h"

namespace fastllm {
namespace {

void check_logits(const char* op, const Tensor& logits) {
  check(logits.ndim == 2 && logits.dtype == DType::f32 && logits.shape[1] > 0 &&
            logits.shape[1] < INT32_MAX && rows_contiguous(logits),
        op, "logits must be f32 [tokens, experts] with contiguous rows, at least one expert");
}
bool is_matrix(const Tensor& t, DType dtype, int64_t rows, int64_t columns) {
  return t.ndim == 2 && t.dtype == dtype && t.contiguous() && t.shape[0] == rows &&
         t.shape[1] == columns;
}
bool is_vector(const Tensor& t, DType dtype, int64_t n) {
  return t.ndim == 1 && t.dtype == dtype && t.contiguous() && t.shape[0] == n;
}
bool is_scalar(const Tensor& t) { return t.ndim == 0 && t.dtype == DType::f32; }
int64_t chunks_of(int64_t tokens) { return (tokens + kGateChunk - 1) / kGateChunk; }

}  // namespace

int64_t moe_gate_scratch(int64_t tokens, int64_t experts) {
  const int64_t chunks = chunks_of(tokens);
  return chunks > 1 ? chunks * (2 * experts + 1) : 0;
}

MoeGateArgs moe_gate_args(Tensor weights, Tensor ids, Tensor counts, Tensor score_sum, Tensor z_sum,
                          Tensor partial, Tensor logits, Tensor bias, bool sigmoid, int64_t groups,
                          int64_t kept_groups, bool top2, bool renormalize, double scale) {
  const char* op = "moe_gate";
  check_logits(op, logits);
  const int64_t tokens = logits.shape[0], experts = logits.shape[1];
  check(ids.ndim == 2 && ids.shape[1] >= 1 && is_matrix(ids, DType::i32, tokens, ids.shape[1]), op,
        "ids must be contiguous i32 [tokens, k]");
  const int64_t k = ids.shape[1];
  check(is_matrix(weights, DType::f32, tokens, k), op, "weights must be contiguous f32 like ids");
  check(is_vector(counts, DType::i32, experts) && is_vector(score_sum, DType::f32, experts), op,
        "counts (i32) and score_sum (f32) must be contiguous [experts]");
  check(is_scalar(z_sum), op, "z_sum must be one f32");
  check(!bias.given() || is_vector(bias, DType::f32, experts), op,
        "bias must be contiguous f32 [experts]");
  check(groups >= 1 && experts % groups == 0 && kept_groups >= 1 && kept_groups <= groups &&
            k <= kept_groups * (experts / groups),
        op, "groups must divide the experts, and the kept ones hold k");
  check(!top2 || groups == 1 || experts / groups >= 2, op, "a group has no two experts");
  const int64_t scratch = moe_gate_scratch(tokens, experts);
  check(scratch == 0 || (partial.given() && partial.dtype == DType::f32 && partial.contiguous() &&
                         partial.numel() >= scratch),
        op, "partial is too small");
  return {.ids = ids.as<int32_t>(),
          .weights = weights.as<float>(),
          .counts = counts.as<int32_t>(),
          .score_sum = score_sum.as<float>(),
          .z_sum = z_sum.as<float>(),
          .partial = partial.as<float>(),
          .logits = logits.as<float>(),
          .bias = bias.as<float>(),
          .tokens = tokens,
          .experts = experts,
          .k = k,
          .stride = logits.stride[0],
          .groups = groups,
          .kept_groups = kept_groups,
          .scale = static_cast<float>(scale),
          .sigmoid = sigmoid,
          .top2 = top2,
          .renormalize = renormalize};
}

MoeGateBackwardArgs moe_gate_backward_args(Tensor dlogits, Tensor logits, Tensor ids,
                                           Tensor d_weights, Tensor d_score_sum, Tensor d_z_sum,
                                           bool sigmoid, bool renormalize, double scale) {
  const char* op = "moe_gate_backward";
  check_logits(op, logits);
  const int64_t tokens = logits.shape[0], experts = logits.shape[1];
  check(is_matrix(dlogits, DType::f32, tokens, experts), op,
        "dlogits must be contiguous f32 like logits");
  check(ids.ndim == 2 && ids.shape[1] >= 1 && is_matrix(ids, DType::i32, tokens, ids.shape[1]), op,
        "ids must be contiguous i32 [tokens, k]");
  check(is_matrix(d_weights, DType::f32, tokens, ids.shape[1]), op,
        "d_weights must be contiguous f32 like ids");
  check(is_vector(d_score_sum, DType::f32, experts), op,
        "d_score_sum must be contiguous f32 [experts]");
  check(is_scalar(d_z_sum), op, "d_z_sum must be one f32");
  return {.dlogits = dlogits.as<float>(),
          .logits = logits.as<float>(),
          .ids = ids.as<int32_t>(),
          .d_weights = d_weights.as<float>(),
          .d_score_sum = d_score_sum.as<float>(),
          .d_z_sum = d_z_sum.as<float>(),
          .tokens = tokens,
          .experts = experts,
          .k = ids.shape[1],
          .stride = logits.stride[0],
          .scale = static_cast<float>(scale),
          .sigmoid = sigmoid,
          .renormalize = renormalize};
}

}  // namespace fastllm
