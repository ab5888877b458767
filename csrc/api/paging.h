// Checks that ops on a paged cache share.
#pragma once
#include "ops.h"

namespace fastllm {

Paging paging_of(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& block_table, const Tensor& cu_seqlens, const Tensor& cache_seqlens,
                 int64_t tokens);

}  // namespace fastllm
