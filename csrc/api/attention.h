// Checks that the attention ops share.
#pragma once
#include "ops_core.h"

namespace fastllm {

void check_attention_rows(const char* op, const AttentionRows& a, double softcap);

// The pointer of `sinks`, null if not given.
const float* sinks_of(const char* op, const Tensor& sinks, int64_t heads);

// A window cut to a distance past every key, so that sums of positions stay in range.
inline int64_t near_window(int64_t window) {
  constexpr int64_t kFar = int64_t{1} << 40;
  return window < kFar ? window : kFar;
}

// How many f32 the partials of rows over so many key positions are.
int64_t partial_floats(const AttentionRows& a, int64_t positions);
void check_partials(const char* op, const Tensor& partials, const AttentionRows& a,
                    const Paging& paging);

}  // namespace fastllm
