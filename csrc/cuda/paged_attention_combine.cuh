// The second kernel of paged attention: the splits that a row sees, merged in ascending order.
#pragma once
#include "cuda/paged_attention_common.cuh"

namespace fastllm::cuda {

// Grid (heads, sequences, token slots). A thread owns a column of the output; 32 splits at a time,
// a lane finds the factors of one of them.
//
//   m' = max(m, m2);  keep = exp2(m - m');  add = exp2(m2 - m');  o = o2 * add + o * keep
template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ PagedAttentionParams p) {
  const int head = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x) % 32;
  const SequenceOfBlock seq = sequence_at(p, static_cast<int>(blockIdx.y));
  const int64_t split_stride = static_cast<int64_t>(p.tokens) * p.heads;
  for (int token = static_cast<int>(blockIdx.z); token < seq.tokens;
       token += static_cast<int>(gridDim.z)) {
    const Range range = seen_by(p, seq, token, token);
    const int end = (range.end + kSplit - 1) / kSplit;
    const int64_t row = static_cast<int64_t>(seq.begin + token) * p.heads + head;
    for (int first = 0; first < p.value_dim; first += kThreads) {
      const int column = first + static_cast<int>(threadIdx.x);
      float m = -kInfinity, l = 0.f, o = 0.f;
      for (int split = range.begin / kSplit; split < end; split += 32) {
        const int count = end - split < 32 ? end - split : 32;
        float top = -kInfinity, sum = 0.f;
        if (lane < count) {
          const int64_t at = (split + lane) * split_stride + row;
          top = load_coherent(p.stats + 2 * at);
          sum = load_coherent(p.stats + 2 * at + 1);
        }
        const float own = top;
        top = fmaxf(top, m);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const float below = from_lane_below(top, distance);
          if (lane >= distance) top = fmaxf(top, below);
        }
        float before = from_lane_below(top, 1);
        if (lane == 0) before = m;
        const float shift = finite_or_zero(top);
        const float keep = exp2_fast(before - shift), add = exp2_fast(own - shift);
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
          float part = 0.f;
          if (column < p.value_dim)
            part = load_coherent(p.partials + ((split + i) * split_stride + row) * p.value_dim +
                                 column);
          const float k = from_lane(keep, i), a = from_lane(add, i);
          l = fmaf(from_lane(sum, i), a, l * k);
          o = fmaf(part, a, o * k);
        }
        m = from_lane(top, count - 1);
      }
      o *= finish_factor(p, m, l, head);
      // Columns come in pairs of neighbouring lanes.
      const float next = from_lane_xor(o, 1);
      if (column < p.value_dim && lane % 2 == 0)
        store(reinterpret_cast<uint32_t*>(p.o) + (row * p.value_dim + column) / 2,
              pack<T>(o, next));
    }
  }
}

}  // namespace fastllm::cuda
