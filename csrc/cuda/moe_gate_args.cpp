// Checks of the router's arguments on the GPU.
#include "common/check.h"
#include "cuda/moe_gate_params.h"

namespace fastllm::cuda {
namespace {

constexpr const char* kOp = "moe_gate (CUDA)";

bool is_vector(const Tensor& t, DType dtype, int64_t n) {
  return t.ndim == 1 && t.dtype == dtype && t.contiguous() && t.shape[0] == n;
}
bool is_slots(const Tensor& t, DType dtype, int64_t tokens, int64_t k) {
  return t.ndim == 2 && t.dtype == dtype && t.contiguous() && t.shape[0] == tokens &&
         t.shape[1] == k;
}

void check_options(int64_t experts, int64_t k, int64_t groups, int64_t kept_groups, bool top2) {
  check(k >= 1 && k <= kGateMaxSlots, kOp, "k must be 1 to 32");
  check(groups >= 1 && groups <= kGateMaxGroups && experts % groups == 0, kOp,
        "groups must divide the experts and be 32 at most");
  check(kept_groups >= 1 && kept_groups <= groups && k <= kept_groups * (experts / groups), kOp,
        "the kept groups must hold k experts");
  check(!top2 || groups == 1 || experts / groups >= 2, kOp, "a group has no two experts");
}

}  // namespace

MoeGateCall moe_gate_call(Tensor weights, Tensor ids, Tensor counts, Tensor score_sum, Tensor z_sum,
                          Tensor offsets, Tensor slots, Tensor scratch, Tensor logits, Tensor bias,
                          bool sigmoid, int64_t groups, int64_t kept_groups, bool top2,
                          bool renormalize, double scale, int64_t first_expert) {
  check(logits.ndim == 2 && logits.dtype == DType::f32 && rows_contiguous(logits), kOp,
        "logits must be f32 [tokens, experts] with contiguous rows");
  const int64_t tokens = logits.shape[0], experts = logits.shape[1];
  check(experts >= 1 && experts <= kGateMaxExperts && tokens <= kGateMaxTokens, kOp,
        "logits must be of 1 to 512 experts and at most 8,192 tokens");
  check(ids.ndim == 2 && is_slots(ids, DType::i32, tokens, ids.shape[1]), kOp,
        "ids must be contiguous i32 [tokens, k]");
  const int64_t k = ids.shape[1];
  check_options(experts, k, groups, kept_groups, top2);
  check(is_slots(weights, DType::f32, tokens, k), kOp, "weights must be contiguous f32 like ids");
  check(is_vector(counts, DType::i32, experts) && is_vector(score_sum, DType::f32, experts), kOp,
        "counts (i32) and score_sum (f32) must be contiguous [experts]");
  check(z_sum.ndim == 0 && z_sum.dtype == DType::f32, kOp, "z_sum must be one f32");
  check(!bias.given() || is_vector(bias, DType::f32, experts), kOp,
        "bias must be contiguous f32 [experts]");
  check(offsets.given() == slots.given(), kOp, "offsets and slots go together");
  if (slots.given()) {
    check(is_vector(slots, DType::i32, tokens * k), kOp, "slots must be contiguous i32 [T * k]");
    check(offsets.ndim == 1 && offsets.shape[0] >= 1 &&
              is_vector(offsets, DType::i32, offsets.shape[0]) && first_expert >= 0 &&
              first_expert + offsets.shape[0] - 1 <= experts,
          kOp, "offsets must be contiguous i32 [n + 1] for n of the experts");
  }
  check(scratch.dtype == DType::f32 && scratch.contiguous() &&
            scratch.numel() >= gate_scratch(tokens, experts),
        kOp, "scratch is too small");

  MoeGateCall call{};
  call.blocks = gate_blocks(tokens);
  for (call.values = 1; call.values * 32 < experts;) call.values *= 2;
  MoeGateParams& p = call.p;
  p.ids = ids.as<int32_t>();
  p.weights = weights.as<float>();
  p.counts = counts.as<int32_t>();
  p.score_sum = score_sum.as<float>();
  p.z_sum = z_sum.as<float>();
  p.offsets = offsets.as<int32_t>();
  p.slots = slots.as<int32_t>();
  p.block_scores = scratch.as<float>();
  p.block_counts = reinterpret_cast<int32_t*>(p.block_scores + call.blocks * experts);
  p.block_z = p.block_scores + 2 * call.blocks * experts;
  p.logits = logits.as<float>();
  p.bias = bias.as<float>();
  p.stride = logits.stride[0];
  p.tokens = static_cast<int32_t>(tokens);
  p.experts = static_cast<int32_t>(experts);
  p.k = static_cast<int32_t>(k);
  p.groups = static_cast<int32_t>(groups);
  p.kept_groups = static_cast<int32_t>(kept_groups);
  p.group_size = static_cast<int32_t>(experts / groups);
  p.chunk = static_cast<int32_t>((tokens + call.blocks - 1) / call.blocks);
  p.first_expert = static_cast<int32_t>(first_expert);
  p.slice = slots.given() ? static_cast<int32_t>(offsets.shape[0] - 1) : 0;
  p.scale = static_cast<float>(scale);
  p.sigmoid = sigmoid;
  p.by_logits = !bias.given() && (groups == 1 || !top2);
  p.top2 = top2;
  p.renormalize = renormalize;
  p.shared = gate_shared(p);
  return call;
}

}  // namespace fastllm::cuda
