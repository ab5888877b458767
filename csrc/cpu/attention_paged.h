// What attention over a paged cache is, whatever its pages hold.
#pragma once
#include "cpu/attention_block.h"
#include "cpu/paging.h"

namespace fastllm::FASTLLM_ISA {
namespace {

FASTLLM_INLINE Document paged_document(const Paging& paging, const AttentionRows& rows, int64_t s) {
  const Sequence seq = sequence_at(paging, s);
  return {.begin = seq.begin,
          .count = seq.end - seq.begin,
          .first = seq.first,
          .keys = smaller(seq.length, paging.table_width * paging.page_size),
          .q_at = seq.begin * rows.q.token_stride,
          .lse_at = 0,
          .lse_head_stride = 0};
}

template <class E, class Source>
void attend_paged(const Paging& paging, const AttentionRows& rows, const Source& source,
                  bool local_tiles, const Team& team) {
  int64_t longest = 0, covered = 0;
  for (int64_t s = 0; s < paging.sequences; ++s) {
    const Document doc = source.document(s);
    longest = larger(longest, doc.keys);
    covered = larger(covered, doc.begin + doc.count);
  }
  if (team.thread == 0) clear_rows(rows, covered, paging.tokens);
  attend<E>(rows, source, rows.partials && longest > kSplit, local_tiles, team);
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
