// What both kernels of paged attention share: where the tokens of a sequence lie, what they see,
// how a row is finished.
#pragma once
#include "cuda/paged_attention_params.h"
#include "cuda/ptx.cuh"

namespace fastllm::cuda {

constexpr float kInfinity = __builtin_huge_valf();
constexpr int32_t kNever = -2147483647 - 1;  // the position of a row that sees nothing

__device__ __forceinline__ int clamp_to(int i, int low, int high) {
  return i < low ? low : i > high ? high : i;
}
// exp2(x - m) needs a finite m where nothing was seen yet.
__device__ __forceinline__ float finite_or_zero(float m) { return m == -kInfinity ? 0.f : m; }

// The new tokens of a sequence are rows [begin, begin + tokens) of q, the last of `length`
// positions. Metadata is not trusted: rows and pages lie inside their tensors whatever it says.
struct SequenceOfBlock {
  int32_t begin, tokens, length;
  __device__ __forceinline__ int first() const { return length - tokens; }
};
__device__ __forceinline__ SequenceOfBlock sequence_at(const PagedAttentionParams& p, int s) {
  const int begin = clamp_to(load(p.cu_seqlens + s), 0, p.tokens);
  const int end = clamp_to(load(p.cu_seqlens + s + 1), begin, p.tokens);
  return {begin, end - begin, clamp_to(load(p.cache_seqlens + s), 0, p.capacity)};
}

struct Range {
  int32_t begin, end;
};
// The positions that some of the tokens [first, last] of a sequence see.
__device__ __forceinline__ Range seen_by(const PagedAttentionParams& p, const SequenceOfBlock& s,
                                         int first, int last) {
  const int end = s.first() + last + 1;
  const int begin = p.window_left < 0 ? 0 : s.first() + first - p.window_left;
  return {begin < 0 ? 0 : begin, s.length > 0 && end > 0 ? end : 0};
}

// Factor and sum of a finished row: o = accumulated * factor.
__device__ __forceinline__ float finish_factor(const PagedAttentionParams& p, float m, float l,
                                               int head) {
  float keep = 1.f;
  if (p.sinks) {  // one more logit, without a value
    const float sink = load(p.sinks + head) * 1.4426950408889634f;
    const float top = finite_or_zero(fmaxf(m, sink));
    keep = exp2_fast(m - top);
    l = fmaf(l, keep, exp2_fast(sink - top));
  }
  return keep / (l == 0.f ? 1.f : l);  // the sum is 0 for a row that sees nothing
}

}  // namespace fastllm::cuda
