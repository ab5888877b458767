// What some calls do to a group's scores between the two products: hide keys, cap logits, apply the
// scales of int8 keys. Each is one pass over at most kMaxRows x 64 scores.
#pragma once
#include "cpu/attention_tile.h"

namespace fastllm::FASTLLM_ISA {
namespace {

FASTLLM_INLINE vi lane_index() {
  vi at;
  for (int i = 0; i < VL; ++i) at[i] = i;
  return at;
}

// Hides all positions of a tile outside [begin, end) and those whose bit of `visible` is 0.
FASTLLM_INLINE void mask_row(float* scores, int64_t begin, int64_t end, uint64_t visible) {
  const int low = static_cast<int>(begin < 0 ? 0 : begin > kTile ? kTile : begin);
  const int high = static_cast<int>(end < 0 ? 0 : end > kTile ? kTile : end);
  const vf hidden = vset(-__builtin_inff());
  for (int c = 0; c < kTile; c += VL) {
    const vi at = lane_index() + c;
    const vf x = vload(scores + c);
    vi seen = (at >= low) & (at < high);
    if (visible != ~uint64_t{0}) {
      const vi bits = vseti(static_cast<int32_t>(visible >> c));
      seen &= (bits & (vseti(1) << lane_index())) != 0;
    }
    vstore(scores + c, seen ? x : hidden);
  }
}

// scores *= scale[position].
FASTLLM_INLINE void scale_columns(float (*scores)[kTile], int64_t rows, const float* scale) {
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kTile; c += VL)
      vstore(scores[r] + c, vload(scores[r] + c) * vload(scale + c));
}

// Hyperbolic tangent with the exponential of scores.
FASTLLM_INLINE vf vtanh(vf x) {
  return tanh_of(x, vexp2<6>(vabs(x) * vset(-2.88539008177792681f)));
}

// scores = tanh(scale * scores).
FASTLLM_INLINE void cap_scores(float (*scores)[kTile], int64_t rows, float scale) {
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < kTile; c += VL) vstore(scores[r] + c, vtanh(vload(scores[r] + c) * scale));
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
