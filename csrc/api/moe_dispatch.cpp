#include "common/check.h"
#include "ops.h"

namespace fastllm {

int64_t moe_dispatch_scratch(int64_t count, int64_t experts) {
  return (count + kDispatchChunk - 1) / kDispatchChunk * experts;
}

MoeDispatchArgs moe_dispatch_args(Tensor offsets, Tensor slots, Tensor counts, Tensor ids,
                                  int64_t first) {
  const char* op = "moe_dispatch";
  const auto is_list = [](const Tensor& t) {
    return t.ndim == 1 && t.dtype == DType::i32 && t.contiguous();
  };
  check(ids.ndim == 2 && ids.dtype == DType::i32 && ids.contiguous() && ids.numel() < INT32_MAX, op,
        "ids must be contiguous i32 [tokens, k]");
  check(is_list(offsets) && offsets.shape[0] >= 1, op, "offsets must be contiguous i32 [n + 1]");
  check(is_list(slots) && slots.shape[0] == ids.numel(), op,
        "slots must be contiguous i32, one for each id");
  const int64_t experts = offsets.shape[0] - 1;
  check(is_list(counts) && counts.shape[0] >= moe_dispatch_scratch(ids.numel(), experts), op,
        "counts is too small");
  check(first >= 0, op, "the first expert must not be negative");
  return {.offsets = offsets.as<int32_t>(),
          .slots = slots.as<int32_t>(),
          .counts = counts.as<int32_t>(),
          .ids = ids.as<int32_t>(),
          .count = ids.numel(),
          .experts = experts,
          .first = first};
}

}  // namespace fastllm
