#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

EmbeddingBackwardArgs embedding_backward_args(Tensor dweight, Tensor dy, Tensor ids, Tensor order) {
  const char* op = "embedding_backward";
  check(dweight.ndim == 2 && dweight.contiguous() && is_stored_float(dweight), op,
        "dweight must be contiguous [n, k] of f32, bf16 or f16");
  check(ids.given() && ids.contiguous() && (ids.dtype == DType::i32 || ids.dtype == DType::i64), op,
        "ids must be contiguous int32 or int64");
  const int64_t n = dweight.shape[0], k = dweight.shape[1], count = ids.numel();
  check(dy.given() && is_float(dy) && dy.contiguous() && dy.numel() == count * k, op,
        "dy must be f32 or bf16, contiguous, with a row of k columns for each id");
  check(n < INT32_MAX && count < INT32_MAX, op, "there are too many ids or rows");
  check(order.dtype == DType::i32 && order.contiguous() && order.numel() >= n + 1 + count, op,
        "order is too small");
  return {.dweight = dweight.data,
          .dy = dy.data,
          .ids = ids.data,
          .order = order.as<int32_t>(),
          .dweight_type = dweight.dtype,
          .dy_type = dy.dtype,
          .ids_type = ids.dtype,
          .count = count,
          .n = n,
          .k = k};
}

}  // namespace fastllm
