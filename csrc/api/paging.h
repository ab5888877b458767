// Checks that ops on a paged cache share.
#pragma once
#include "ops_core.h"

namespace fastllm {

// Checks that these are the parts of a cache of f32, bf16, f16 or int8; which of them an op takes
// is its own matter.
Paging paging_of(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& block_table, const Tensor& cu_seqlens, const Tensor& cache_seqlens,
                 int64_t tokens);

// The same for a compressed cache [num_pages, page_size, columns].
Paging mla_paging_of(const char* op, const Tensor& cache, const Tensor& block_table,
                     const Tensor& cu_seqlens, const Tensor& cache_seqlens, int64_t tokens);

// Checks the scales of a cache: f32 [num_pages, kv_heads, page_size] beside int8, none beside others.
void check_scales(const char* op, const Tensor& k_cache, const Tensor& k_scales,
                  const Tensor& v_scales);

// Throws std::invalid_argument naming the argument unless the values index the cache: starts rise
// from 0 to `tokens`, lengths hold the new tokens and fit their row of the table, pages exist.
// Shapes were checked.
void check_paging_values(const Tensor& block_table, const Tensor& cu_seqlens,
                         const Tensor& cache_seqlens, int64_t tokens, int64_t num_pages,
                         int64_t page_size);

}  // namespace fastllm
