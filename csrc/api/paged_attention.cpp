#include "api/paging.h"
#include "common/check.h"
#include "ops.h"

namespace fastllm {

PagedAttentionArgs paged_attention_args(Tensor o, Tensor q, Tensor k_cache, Tensor v_cache,
                                        Tensor block_table, Tensor cu_seqlens, Tensor cache_seqlens,
                                        Tensor partials, double scale, int64_t window_left) {
  const char* op = "paged_attention";
  check(q.ndim == 3 && rows_contiguous(q) && q.dtype == k_cache.dtype, op,
        "q must be [T, H, D] of the cache's dtype with contiguous D");
  check(is_float(q), op, "q must be f32 or bf16");
  const int64_t tokens = q.shape[0], heads = q.shape[1];
  const Paging paging =
      paging_of(op, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens, tokens);
  const int64_t kv_heads = k_cache.shape[1], dim = k_cache.shape[3], value_dim = v_cache.shape[3];
  check(q.shape[2] == dim, op, "q and k_cache must have the same head dim");
  check(dim % 8 == 0 && value_dim % 8 == 0, op, "the head dims must be multiples of 8");
  check(heads > 0 && heads % kv_heads == 0, op, "H must be a positive multiple of Hk");
  check(o.ndim == 3 && o.shape[0] == tokens && o.shape[1] == heads && o.shape[2] == value_dim &&
            o.dtype == q.dtype && o.contiguous(),
        op, "o must be contiguous [T, H, Dv] of q's dtype");
  check(window_left >= -1, op, "window_left must be -1 (no window) or at least 0");
  if (partials.given()) {
    const int64_t splits = (paging.table_width * paging.page_size + 511) / 512;
    check(partials.ndim == 1 && partials.dtype == DType::f32 && partials.contiguous() &&
              partials.shape[0] >= splits * tokens * heads * ((value_dim + 15) / 16 * 16 + 16),
          op, "partials must be f32 [splits * T * H * (Dv rounded up to 16, plus 16)]");
  }
  return {.o = o.data,
          .q = {q.data, q.stride[0], q.stride[1]},
          .k_cache = k_cache.data,
          .v_cache = v_cache.data,
          .paging = paging,
          .partials = partials.as<float>(),
          .dtype = q.dtype,
          .heads = heads,
          .kv_heads = kv_heads,
          .dim = dim,
          .value_dim = value_dim,
          .window_left = window_left,
          .scale = static_cast<float>(scale)};
}

}  // namespace fastllm
