// First half of the router's kernel: a warp takes a token, lane l holds the logits of experts l, l +
// 32, ... A block then counts the slots of each expert among its own tokens and adds up their
// statistics, warps in ascending order.
#pragma once
#include "cuda/moe_gate_params.h"
#include "cuda/ptx.cuh"

namespace fastllm::cuda {

constexpr int32_t kNoKey = INT32_MIN;  // below the order of every float, -inf included
constexpr float kGateInfinity = __builtin_huge_valf();
constexpr float kGateLog2E = 1.44269504f;
constexpr float kGateEps = 1e-20f;  // keeps sums of scores away from 0 before they divide

__device__ __forceinline__ int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }
__device__ __forceinline__ int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }

// An integer that orders like the float; both zeros are equal. And back.
__device__ __forceinline__ int32_t order_of(float x) {
  const int32_t bits = float_bits(x == 0.f ? 0.f : x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float of_order(int32_t order) {
  return float_of_bits(order ^ ((order >> 31) & 0x7fffffff));
}

__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += from_lane_xor(x, mask);
  return x;
}

struct RowStatistics {
  float shift, sum;  // the maximum, and the sum of exp(x - maximum)
  bool valid;        // no NaN, no +inf, not -inf throughout
};

// s = exp(x - maximum), 0 in places without an expert (x is -inf there).
template <int V>
__device__ __forceinline__ RowStatistics exponentials(const float (&x)[V], float (&s)[V]) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < V; ++i) top = fmaxf(top, x[i]);  // a NaN shows in the sum
  top = of_order(largest_of_lanes(order_of(top)));
  const bool finite = top > -kGateInfinity && top < kGateInfinity;
  const float shift = finite ? top : 0.f;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < V; ++i) sum += s[i] = exp2_fast((x[i] - shift) * kGateLog2E);
  sum = sum_of_lanes(sum);
  return {shift, sum, sum > 0.f && sum < kGateInfinity};
}

// Scores in place of exponentials; returns what divides them for the statistics.
template <int V>
__device__ __forceinline__ float scores_of(const MoeGateParams& p, const float (&x)[V], float sum,
                                           float (&s)[V]) {
  if (!p.sigmoid) {
#pragma unroll
    for (int i = 0; i < V; ++i) s[i] = s[i] / sum;
    return 1.f;
  }
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < V; ++i) total += s[i] = 1.f / (1.f + exp2_fast(-kGateLog2E * x[i]));
  return sum_of_lanes(total) + kGateEps;
}

// The order of each choice, kNoKey without an expert; false where one is NaN or +inf.
template <int V>
__device__ __forceinline__ bool choice_keys(const MoeGateParams& p, const float (&x)[V],
                                            const float (&s)[V], int lane, int32_t (&keys)[V]) {
  bool good = true;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int expert = lane + 32 * i;
    keys[i] = kNoKey;
    if (expert >= p.experts) continue;
    float choice = p.by_logits ? x[i] : s[i];
    if (p.bias) choice += load(p.bias + expert);
    good = good && choice < kGateInfinity;
    keys[i] = order_of(choice);
  }
  return smallest_of_lanes(good ? 1 : 0) == 1;
}

// The place of the largest key of a warp, the lowest of equals; `own` is this lane's largest.
__device__ __forceinline__ int32_t place_of_largest(int32_t own, int32_t place) {
  const int32_t top = largest_of_lanes(own);
  return smallest_of_lanes(own == top ? place : INT32_MAX);
}

// Takes the experts outside the best groups off the list. Lane g ranks group g.
template <int V>
__device__ __forceinline__ void keep_best_groups(const MoeGateParams& p, uint32_t row_at, int lane,
                                                 int32_t (&keys)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (lane + 32 * i < p.experts) shared_at<int32_t>(row_at + 4 * (lane + 32 * i)) = keys[i];
  warp_barrier();
  int32_t rank = kNoKey;
  if (lane < p.groups) {
    int32_t first = kNoKey, second = kNoKey;
    for (int i = 0; i < p.group_size; ++i) {
      // Each lane begins elsewhere, so that groups of 32 do not meet in one bank.
      const int at = lane * p.group_size + (i + lane) % p.group_size;
      const int32_t key = shared_at<int32_t>(row_at + 4 * at);
      second = max_of(second, min_of(first, key));
      first = max_of(first, key);
    }
    rank = p.top2 ? order_of(of_order(first) + of_order(second)) : first;
  }
  uint32_t kept = 0;
  for (int j = 0; j < p.kept_groups; ++j) {
    const int32_t group = place_of_largest(rank, lane);
    kept |= 1u << group;
    if (lane == group) rank = kNoKey;
  }
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (lane + 32 * i < p.experts && !(kept >> ((lane + 32 * i) / p.group_size) & 1))
      keys[i] = kNoKey;
  warp_barrier();  // the next token's keys go to the same place
}

struct Slot {
  int32_t id;
  float score;
};

// Slot j of the token, in lane j: the expert of the j-th largest key.
template <int V>
__device__ __forceinline__ Slot choose(const MoeGateParams& p, const float (&s)[V], int lane,
                                       int32_t (&keys)[V]) {
  Slot slot{-1, 0.f};
  for (int j = 0; j < p.k; ++j) {
    int32_t own = keys[0], place = lane;
#pragma unroll
    for (int i = 1; i < V; ++i)
      if (keys[i] > own) own = keys[i], place = lane + 32 * i;
    const int32_t found = place_of_largest(own, place);
    float score = 0.f;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (found == lane + 32 * i) keys[i] = kNoKey, score = s[i];
    score = from_lane(score, found % 32);
    if (lane == j) slot = {found, score};
  }
  return slot;
}

// One token: its slots, and what it adds to the sums of this warp's tokens.
template <int V>
__device__ __forceinline__ void gate_row(const MoeGateParams& p, int token, uint32_t row_at,
                                         uint32_t ids_at, int lane, float (&sums)[V], float& z) {
  float x[V], s[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    x[i] = -kGateInfinity;
    if (lane + 32 * i < p.experts) x[i] = load(p.logits + token * p.stride + lane + 32 * i);
  }
  const RowStatistics row = exponentials(x, s);
  const float norm = scores_of(p, x, row.sum, s);
  int32_t keys[V];
  const bool valid = choice_keys(p, x, s, lane, keys) && row.valid;
  Slot slot{-1, 0.f};
  if (valid) {  // of the whole warp
    if (p.kept_groups < p.groups) keep_best_groups(p, row_at, lane, keys);
    slot = choose(p, s, lane, keys);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] += s[i] / norm;
    const float lse = row.shift + logf(row.sum);
    z += lse * lse;
  }
  const float divisor = p.renormalize ? sum_of_lanes(slot.score) + kGateEps : 1.f;
  if (lane < p.k) {
    const int64_t at = static_cast<int64_t>(token) * p.k + lane;
    store(p.ids + at, slot.id);
    store(p.weights + at, slot.score / divisor * p.scale);
    shared_at<int32_t>(ids_at + 4 * lane) = slot.id;
  }
}

// How many of the n ids in shared memory are this expert. n is made a multiple of 4 by the caller.
__device__ __forceinline__ int32_t count_ids(uint32_t ids_at, int n, int32_t expert) {
  int32_t count = 0;
  for (int i = 0; i < n; i += 4) {
    const int4 four = shared_at<int4>(ids_at + 4 * i);
    count += (four.x == expert) + (four.y == expert) + (four.z == expert) + (four.w == expert);
  }
  return count;
}

template <int V>
__device__ __forceinline__ void gate_rows(const MoeGateParams& p) {
  const GateShared& shared = p.shared;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int block = static_cast<int>(blockIdx.x), begin = block * p.chunk;
  const int tokens = max_of(0, min_of(p.chunk, p.tokens - begin));
  const uint32_t row_at = static_cast<uint32_t>(4 * warp * p.experts);
  float sums[V] = {}, z = 0.f;
  for (int i = warp; i < tokens; i += kGateWarps)
    gate_row<V>(p, begin + i, row_at, static_cast<uint32_t>(shared.ids_at + 4 * i * p.k), lane,
                sums, z);
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (lane + 32 * i < p.experts) shared_at<float>(row_at + 4 * (lane + 32 * i)) = sums[i];
  if (lane == 0) shared_at<float>(shared.warps_at + 4 * warp) = z;
  const int slots = tokens * p.k, padded = (slots + 3) / 4 * 4;
  if (thread < padded - slots) shared_at<int32_t>(shared.ids_at + 4 * (slots + thread)) = -1;
  block_barrier();
  if (thread < p.experts) {
    const int64_t at = static_cast<int64_t>(block) * p.experts + thread;
    float sum = 0.f;
    for (int w = 0; w < kGateWarps; ++w) sum += shared_at<float>(4 * (w * p.experts + thread));
    store(p.block_scores + at, sum);
    store(p.block_counts + at, count_ids(shared.ids_at, padded, thread));
  }
  if (thread == 0) {
    float sum = 0.f;
    for (int w = 0; w < kGateWarps; ++w) sum += shared_at<float>(shared.warps_at + 4 * w);
    store(p.block_z + block, sum);
  }
}

}  // namespace fastllm::cuda
