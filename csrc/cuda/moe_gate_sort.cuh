// Second half of the router's kernel, after all blocks have counted: the sums over blocks, and a
// stable counting sort of the slots by expert. Thread e owns expert e: its slots begin after those
// of the experts before it and, in this block, after those of the blocks before.
#pragma once
#include "cuda/moe_gate_rows.cuh"

namespace fastllm::cuda {

// The sum over the threads before this one, and over all. Every thread of the block calls it.
struct Scan {
  int32_t before, all;
};
__device__ __forceinline__ Scan scan_of_threads(int32_t value, uint32_t warps_at) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = from_lane_below(sum, distance);
    if (lane >= distance) sum += below;
  }
  if (lane == 31) shared_at<int32_t>(warps_at + 4 * warp) = sum;
  block_barrier();
  Scan scan{sum - value, 0};
  for (int w = 0; w < kGateWarps; ++w) {
    const int32_t of_warp = shared_at<int32_t>(warps_at + 4 * w);
    if (w < warp) scan.before += of_warp;
    scan.all += of_warp;
  }
  return scan;
}

// The sum of column `thread` of [blocks, columns], blocks ascending.
template <class V>
__device__ __forceinline__ V sum_of_blocks(const V* from, int blocks, int columns, int column) {
  V sum = 0;
#pragma unroll 8
  for (int b = 0; b < blocks; ++b) sum += load_coherent(from + b * columns + column);
  return sum;
}

// The slots of this block's tokens, each thread writing those of its expert in order.
__device__ __forceinline__ void write_slots(const MoeGateParams& p, const GateShared& shared,
                                            int32_t next, bool mine) {
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) * p.chunk * p.k;
  const int slots = max_of(0, min_of(p.chunk * p.k, p.tokens * p.k - first));
  const int padded = (slots + 3) / 4 * 4;
  for (int i = thread; i < padded; i += kGateThreads)
    shared_at<int32_t>(shared.ids_at + 4 * i) = i < slots ? load_coherent(p.ids + first + i) : -1;
  block_barrier();
  if (!mine) return;
  for (int i = 0; i < padded; i += 4) {
    const int4 four = shared_at<int4>(shared.ids_at + 4 * i);
    const int32_t ids[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (ids[j] == thread) store(p.slots + next++, first + i + j);
  }
}

__device__ __forceinline__ void sort_slots(const MoeGateParams& p) {
  const GateShared& shared = p.shared;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  int32_t before = 0, total = 0;
  if (thread < p.experts) {
    before = sum_of_blocks(p.block_counts, block, p.experts, thread);
    total = before +
            sum_of_blocks(p.block_counts + block * p.experts, blocks - block, p.experts, thread);
    if (block == 0) store(p.counts + thread, total);
    if (block == blocks - 1)
      store(p.score_sum + thread, sum_of_blocks(p.block_scores, blocks, p.experts, thread));
  }
  if (block == blocks - 1 && thread == 0) store(p.z_sum, sum_of_blocks(p.block_z, blocks, 1, 0));
  if (!p.slots) return;
  const int local = thread - p.first_expert;
  const bool mine = local >= 0 && local < p.slice;
  const Scan scan = scan_of_threads(mine ? total : 0, static_cast<uint32_t>(shared.warps_at));
  if (block == 0) {
    if (mine) store(p.offsets + local, scan.before);
    if (thread == 0) store(p.offsets + p.slice, scan.all);
  }
  write_slots(p, shared, scan.before + before, mine);
  for (int i = scan.all + block * kGateThreads + thread; i < p.tokens * p.k;
       i += blocks * kGateThreads)
    store(p.slots + i, -1);
}

}  // namespace fastllm::cuda
