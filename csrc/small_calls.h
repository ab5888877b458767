// Which calls are too small to wake a team for. A fork of two threads costs 1.4 us while they spin,
// and a time slice where another process has taken their core; a row of a decode step is done in
// less. Bits do not depend on the number of threads.
#pragma once
#include "ops_core.h"

namespace fastllm {

constexpr int64_t kFewCopied = 8192;  // elements of a norm or a rotation: 1.5 us on a Zen 5 core
constexpr int64_t kFewGated = 4096;   // of an activation with its exponential: 1.3 us
// Products of attention: 64 keys of 9 heads of 64 take 5 us of a Zen 4 core and 9 of two, as calls
// 19 and 36, for the second thread sleeps meanwhile; 16 keys of 32 heads of 128 take 13 and 12.
constexpr int64_t kFewAttended = 131072;

template <class Args>
bool runs_alone(const Args&) {
  return false;
}
inline bool runs_alone(const RmsNormArgs& a) { return a.outer * a.inner * a.n <= kFewCopied; }
inline bool runs_alone(const RmsNormBackwardArgs& a) {
  return a.outer * a.inner * a.n <= kFewCopied;
}
inline bool runs_alone(const RopeArgs& a) { return a.tokens * a.heads * a.dim <= kFewCopied; }
inline bool runs_alone(const SwigluArgs& a) { return a.outer * a.inner * a.n <= kFewGated; }
inline bool runs_alone(const SwigluBackwardArgs& a) { return a.outer * a.inner * a.n <= kFewGated; }
inline bool attends_few(const AttentionRows& a, int64_t keys) {
  return a.tokens * a.heads * (a.dim + a.value_dim) * keys <= kFewAttended;
}
inline bool runs_alone(const AttentionArgs& a) { return attends_few(a.rows, a.keys); }
inline bool runs_alone(const PagedAttentionArgs& a) {
  int64_t longest = 0;
  for (int64_t s = 0; s < a.paging.sequences; ++s)
    longest = a.paging.cache_seqlens[s] > longest ? a.paging.cache_seqlens[s] : longest;
  return attends_few(a.rows, longest);
}

}  // namespace fastllm
