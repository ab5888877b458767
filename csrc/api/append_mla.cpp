#include "api/paging.h"
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

AppendMlaArgs append_mla_args(Tensor latent, Tensor rope_key, Tensor cache, Tensor block_table,
                              Tensor cu_seqlens, Tensor cache_seqlens) {
  const char* op = "append_mla";
  for (const Tensor* rows : {&latent, &rope_key})
    check(rows->ndim == 2 && rows->dtype == cache.dtype && rows_contiguous(*rows) &&
              rows->shape[0] == latent.shape[0],
          op, "latent and rope_key must be [T, columns] of the cache's dtype, rows contiguous");
  const Paging paging =
      mla_paging_of(op, cache, block_table, cu_seqlens, cache_seqlens, latent.shape[0]);
  check(latent.shape[1] + rope_key.shape[1] == cache.shape[2], op,
        "latent and rope_key must fill the columns of the cache");
  const int64_t size = cache.dtype == DType::f32 ? 4 : 2;
  return {.cache = cache.as<char>(),
          .latent = latent.as<char>(),
          .rope_key = rope_key.as<char>(),
          .paging = paging,
          .latent_bytes = latent.shape[1] * size,
          .rope_key_bytes = rope_key.shape[1] * size,
          .latent_stride = latent.stride[0] * size,
          .rope_key_stride = rope_key.stride[0] * size};
}

Paging mla_paging_of(const char* op, const Tensor& cache, const Tensor& block_table,
                     const Tensor& cu_seqlens, const Tensor& cache_seqlens, int64_t tokens) {
  check(cache.ndim == 3 && cache.contiguous() && cache.shape[1] > 0, op,
        "the cache must be contiguous [num_pages, page_size, columns]");
  check(cache.dtype == DType::f32 || cache.dtype == DType::bf16 || cache.dtype == DType::f16, op,
        "the cache must be f32, bf16 or f16");
  check(cache_seqlens.ndim == 1 && cache_seqlens.dtype == DType::i32 && cache_seqlens.contiguous(),
        op, "cache_seqlens must be contiguous int32 [S]");
  const int64_t sequences = cache_seqlens.shape[0];
  check(cu_seqlens.ndim == 1 && cu_seqlens.dtype == DType::i32 && cu_seqlens.contiguous() &&
            cu_seqlens.shape[0] == sequences + 1,
        op, "cu_seqlens_q must be contiguous int32 [S + 1]");
  check(block_table.ndim == 2 && block_table.dtype == DType::i32 &&
            block_table.shape[0] == sequences && rows_contiguous(block_table),
        op, "block_table must be int32 [S, pages] with contiguous rows");
  return {.block_table = block_table.as<int32_t>(),
          .cu_seqlens = cu_seqlens.as<int32_t>(),
          .cache_seqlens = cache_seqlens.as<int32_t>(),
          .sequences = sequences,
          .table_width = block_table.shape[1],
          .table_stride = block_table.stride[0],
          .tokens = tokens,
          .num_pages = cache.shape[0],
          .page_size = cache.shape[1]};
}

}  // namespace fastllm
