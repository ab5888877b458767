#include "api/attention.h"
#include "api/paging.h"
#include "common/check.h"

namespace fastllm {

MlaAttentionArgs mla_attention_args(Tensor o, Tensor q, Tensor cache, Tensor block_table,
                                    Tensor cu_seqlens, Tensor cache_seqlens, Tensor partials,
                                    int64_t value_dim, double scale) {
  const char* op = "mla_attention";
  check(q.ndim == 3 && rows_contiguous(q) && q.dtype == cache.dtype, op,
        "q must be [T, H, columns] of the cache's dtype, rows contiguous");
  const int64_t tokens = q.shape[0], heads = q.shape[1];
  const Paging paging = mla_paging_of(op, cache, block_table, cu_seqlens, cache_seqlens, tokens);
  check(paging.page_size % 64 == 0, op, "page_size must be a multiple of 64, the kernel's tile");
  check(q.shape[2] == cache.shape[2] && value_dim <= cache.shape[2], op,
        "q must have the columns of the cache, and value_dim no more");
  check(o.ndim == 3 && o.shape[0] == tokens && o.shape[1] == heads && o.shape[2] == value_dim &&
            o.dtype == q.dtype && o.contiguous(),
        op, "o must be contiguous [T, H, value_dim] of q's dtype");
  MlaAttentionArgs a{.rows = {.o = o.data,
                              .lse = nullptr,
                              .q = {q.data, q.stride[0], q.stride[1]},
                              .sinks = nullptr,
                              .partials = partials.as<float>(),
                              .dtype = q.dtype,
                              .tokens = tokens,
                              .heads = heads,
                              .kv_heads = 1,
                              .dim = q.shape[2],
                              .value_dim = value_dim,
                              .window_left = -1,
                              .window_right = 0,
                              .scale = static_cast<float>(scale),
                              .softcap = 0.f},
                     .cache = cache.data,
                     .paging = paging};
  check_attention_rows(op, a.rows, 0);
  check_partials(op, partials, a.rows, paging);
  return a;
}

}  // namespace fastllm
