// Finding tokens and pages from the int32 metadata of a paged cache. The metadata is read while
// kernels run, so nothing here trusts it: every row and page that comes out lies inside its tensor.
#pragma once
#include "cpu/simd.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {

// The new tokens of one sequence: rows [begin, end) of q, k, v, the first of them at position
// `first`.
struct Sequence {
  int64_t begin, end;
  int64_t first;
  int64_t length;  // cached tokens, the new ones included; 0 for a dead slot
};

FASTLLM_INLINE int64_t clamp_index(int64_t i, int64_t size) {
  return i < 0 ? 0 : i > size ? size : i;
}

FASTLLM_INLINE Sequence sequence_at(const Paging& p, int64_t s) {
  Sequence q;
  q.begin = clamp_index(p.cu_seqlens[s], p.tokens);
  q.end = clamp_index(p.cu_seqlens[s + 1], p.tokens);
  if (q.end < q.begin) q.end = q.begin;
  q.length = p.cache_seqlens[s] > 0 ? p.cache_seqlens[s] : 0;
  q.first = q.length - (q.end - q.begin);
  return q;
}

// The page that holds a position of sequence s, or -1 if the table has none.
FASTLLM_INLINE int64_t page_at(const Paging& p, int64_t s, int64_t position) {
  if (position < 0) return -1;
  const int64_t column = position / p.page_size;
  if (column >= p.table_width) return -1;
  const int64_t page = p.block_table[s * p.table_stride + column];
  return page >= 0 && page < p.num_pages ? page : -1;
}

}  // namespace fastllm::FASTLLM_ISA
