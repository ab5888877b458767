#include "api/attention.h"
#include "api/paging.h"
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

PagedAttentionArgs paged_attention_args(Tensor o, Tensor q, Tensor k_cache, Tensor v_cache,
                                        Tensor block_table, Tensor cu_seqlens, Tensor cache_seqlens,
                                        Tensor k_scales, Tensor v_scales, Tensor sinks,
                                        Tensor partials, double scale, int64_t window_left,
                                        double softcap) {
  const char* op = "paged_attention";
  const bool coded = k_cache.dtype == DType::i8;
  check(q.ndim == 3 && rows_contiguous(q) && is_stored_float(q) &&
            (coded || q.dtype == k_cache.dtype),
        op, "q must be [T, H, D] of the cache's dtype with contiguous D");
  const int64_t tokens = q.shape[0], heads = q.shape[1];
  const Paging paging =
      paging_of(op, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens, tokens);
  const int64_t value_dim = v_cache.shape[3];
  check(q.shape[2] == k_cache.shape[3], op, "q and k_cache must have the same head dim");
  check(o.ndim == 3 && o.shape[0] == tokens && o.shape[1] == heads && o.shape[2] == value_dim &&
            o.dtype == q.dtype && o.contiguous(),
        op, "o must be contiguous [T, H, Dv] of q's dtype");
  for (const Tensor& scales : {k_scales, v_scales}) {
    check(scales.given() == coded, op, "int8 caches have scales, other caches have none");
    if (!coded) continue;
    check(scales.ndim == 3 && scales.dtype == DType::f32 && scales.contiguous(), op,
          "the scales must be contiguous f32 [num_pages, Hk, page_size]");
    for (int i = 0; i < 3; ++i)
      check(scales.shape[i] == k_cache.shape[i], op,
            "the scales must be f32 [num_pages, Hk, page_size]");
  }
  PagedAttentionArgs a{.rows = {.o = o.data,
                                .lse = nullptr,
                                .q = {q.data, q.stride[0], q.stride[1]},
                                .sinks = sinks_of(op, sinks, heads),
                                .partials = partials.as<float>(),
                                .dtype = q.dtype,
                                .tokens = tokens,
                                .heads = heads,
                                .kv_heads = k_cache.shape[1],
                                .dim = k_cache.shape[3],
                                .value_dim = value_dim,
                                .window_left = near_window(window_left),
                                .window_right = 0,
                                .scale = static_cast<float>(scale),
                                .softcap = static_cast<float>(softcap)},
                       .k_cache = k_cache.data,
                       .v_cache = v_cache.data,
                       .k_scales = k_scales.as<float>(),
                       .v_scales = v_scales.as<float>(),
                       .paging = paging,
                       .cache_dtype = k_cache.dtype};
  check_attention_rows(op, a.rows, softcap);
  check_partials(op, partials, a.rows, paging);
  return a;
}

}  // namespace fastllm
