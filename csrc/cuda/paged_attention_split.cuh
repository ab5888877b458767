// Causal attention of a few new tokens over a paged cache: the positions of a sequence are cut into
// splits of 512 that run in parallel, here, and are merged in ascending order
// (paged_attention_combine.cuh). Online softmax of FlashAttention (arXiv 2205.14135) over tiles of
// 64 positions, base-2 logits; P is rounded to the dtype of q, everything else is fp32.
//
// A block takes 16 query rows of one KV head: the heads of a GQA group times the new tokens, so
// that each page is read once for all of them. Its four warps split the tile's positions for Q K^T
// (16 each) and the columns of V for P V (a quarter each); P and the maxima of rows go through
// shared memory. Tiles of K and V come in turn through a ring of slots, filled by asynchronous
// copies through the block table.
//
// A row's bits depend on its own keys alone: positions count from the sequence's first, a tile that
// a row does not see changes nothing exactly (alpha = 1, P = 0), the size of a split is fixed.
//
// int8 caches: codes become bf16 or fp16 in registers, exactly. ldmatrix moves pairs of bytes, so a
// lane receives 4 consecutive dimensions where the product wants 2 + 2: Q is stored with its
// dimensions permuted alike, and the columns of the output come out permuted, 4 of one lane in a
// row. The key's scale multiplies the score, the value's scale P before its rounding.
#pragma once
#include "cuda/codes.cuh"
#include "cuda/paged_attention_tiles.cuh"

namespace fastllm::cuda {

// Everything of one block.
template <class T, bool kCodes, int kGroups, bool kAlias, int kSlots>
struct SplitBlock : SplitTiles<T, kCodes, kGroups, kAlias, kSlots> {
  using Tiles = SplitTiles<T, kCodes, kGroups, kAlias, kSlots>;
  using Tiles::find_rows, Tiles::find_pages, Tiles::load_queries;
  using Tiles::first_position, Tiles::last_position, Tiles::high_rows, Tiles::range;
  using Tiles::k_slot, Tiles::v_slot, Tiles::scales_of, Tiles::copy_keys, Tiles::copy_values;
  using Tiles::kPending, Tiles::kPairs, Tiles::p_layout, Tiles::place;
  using Tiles::p, Tiles::kv_head, Tiles::warp, Tiles::lane;
  using Tiles::page_row, Tiles::page_index, Tiles::row_info;
  using Tiles::q_lane, Tiles::p_lane, Tiles::k_lane, Tiles::v_lane;
  using Tiles::row_tile, Tiles::split_begin, Tiles::first_tile, Tiles::tiles;

  float m[2], l[2];          // of rows lane / 4 and lane / 4 + 8
  float acc[kGroups][2][4];  // [group][half][fragment]

  __device__ __forceinline__ SplitBlock(const PagedAttentionParams& params, int head)
      : Tiles(params, head) {}

  // s = Q K^T for this warp's 16 positions: s[n] is the fragment of positions 8 n to 8 n + 7.
  __device__ __forceinline__ void score(float (&s)[2][4], int tile) const {
    const uint32_t keys = k_slot(tile);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (2 * pair >= p.shared.k.chunks) break;
      uint32_t k[4], q[4];
      load_matrices(k, keys + k_lane.at(2 * pair));
      if constexpr (kCodes) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          load_matrices(q, p.shared.q_at + q_lane.at(4 * pair + 2 * half));
#pragma unroll
          for (int n = 0; n < 2; ++n)
            multiply_add<T>(s[n], q, codes_to_pair<T>(k[2 * n + half], 0x4140u),
                            codes_to_pair<T>(k[2 * n + half], 0x4342u));
        }
      } else {
        load_matrices(q, p.shared.q_at + q_lane.at(2 * pair));
        multiply_add<T>(s[0], q, k[0], k[1]);
        multiply_add<T>(s[1], q, k[2], k[3]);
      }
    }
  }

  // Scores to base-2 logits, -inf where the row does not see the position.
  __device__ __forceinline__ void logits(float (&s)[2][4], int tile) const {
    const bool capped = p.cap_out != 0.f;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float by = capped ? 1.f : p.scale_log2;
      float2 scale{by, by};
      if constexpr (kCodes) {
        scale = scales_of(k_slot(tile), p.shared.k, n);
        scale.x *= by;
        scale.y *= by;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= i % 2 ? scale.y : scale.x;
      if (capped)  // tanh(y) = 1 - 2 / (exp(2 y) + 1)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[n][i] = p.cap_out * fmaf(-2.f, reciprocal(exp2_fast(s[n][i] * p.cap_in) + 1.f), 1.f);
    }
    const int begin = (first_tile + tile) * kTile;
    const bool stored = page_row(page_index(begin) + warp) >= 0;
    const bool whole = stored && begin + kTile - 1 <= first_position &&
                       (p.window_left < 0 || begin >= last_position - p.window_left);
    if (whole) return;
    const int rows[2] = {row_info(lane / 4).position, row_info(lane / 4 + 8).position};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // The comparison with `kNever` comes first: its difference would overflow.
        const int position = begin + 16 * warp + 8 * n + lane % 4 * 2 + i % 2, row = rows[i / 2];
        const bool visible =
            stored && position <= row && (p.window_left < 0 || position >= row - p.window_left);
        if (!visible) s[n][i] = -kInfinity;
      }
  }

  // Maximum of a row over the tile: of this warp's positions first, then of all warps'.
  __device__ __forceinline__ void write_maxima(const float (&s)[2][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && !high_rows) break;
      float top = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]),
                        fmaxf(s[1][2 * half], s[1][2 * half + 1]));
      top = fmaxf(top, from_lane_xor(top, 1));
      top = fmaxf(top, from_lane_xor(top, 2));
      if (lane % 4 == 0) of_warp(p.shared.maxima_at, lane / 4 + 8 * half) = top;
    }
  }
  // [row][warp], so that a lane reads those of all warps at once.
  __device__ __forceinline__ float& of_warp(int at, int row) const {
    return shared_at<float>(at + (row * kWarps + warp) * 4);
  }
  __device__ __forceinline__ float4 of_warps(int at, int row) const {
    return shared_at<float4>(at + row * kWarps * 4);
  }

  // P = exp2(s - m) into shared memory, rounded; m, l and the accumulators to the new maximum.
  __device__ __forceinline__ void softmax(float (&s)[2][4], int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && !high_rows) break;
      const int row = lane / 4 + 8 * half;
      const float4 tops = of_warps(p.shared.maxima_at, row);
      const float top = fmaxf(m[half], fmaxf(fmaxf(tops.x, tops.y), fmaxf(tops.z, tops.w)));
      const float shift = finite_or_zero(top);
      const float alpha = exp2_fast(m[half] - shift);
      m[half] = top;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float low = exp2_fast(s[n][2 * half] - shift), high = exp2_fast(s[n][2 * half + 1] - shift);
        sum += low + high;
        if constexpr (kCodes) {
          const float2 scale = scales_of(v_slot(tile), p.shared.v, n);
          low *= scale.x;
          high *= scale.y;
        }
        shared_at<uint32_t>(p.shared.p_at + place(p_layout(), row, 2 * warp + n) + lane % 4 * 4) =
            pack<T>(low, high);
      }
      l[half] = fmaf(l[half], alpha, sum);
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          acc[g][h][2 * half] *= alpha;
          acc[g][h][2 * half + 1] *= alpha;
        }
    }
  }

  // acc += P V for this warp's columns: groups warp, warp + 4, ... of 16.
  __device__ __forceinline__ void add_values(int tile) {
    const uint32_t values = v_slot(tile), rows_16 = 16 * p.shared.v.chunks * kChunk;
#pragma unroll
    for (int pair = 0; pair < kTile / 32; ++pair) {  // 32 positions
      uint32_t probability[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        load_matrices(probability[h], p.shared.p_at + p_lane.at(4 * pair + 2 * h));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if ((warp + kWarps * g) * 16 >= p.value_dim) continue;
        uint32_t v[4];
        if constexpr (kCodes) {
          load_matrices_transposed(v, values + 2 * pair * rows_16 + v_lane.at(4 * g));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            multiply_add<T>(acc[g][0], probability[h], codes_to_pair<T>(v[2 * h], 0x4240u),
                            codes_to_pair<T>(v[2 * h + 1], 0x4240u));
            multiply_add<T>(acc[g][1], probability[h], codes_to_pair<T>(v[2 * h], 0x4341u),
                            codes_to_pair<T>(v[2 * h + 1], 0x4341u));
          }
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            load_matrices_transposed(v, values + (2 * pair + h) * rows_16 + v_lane.at(8 * g));
            multiply_add<T>(acc[g][0], probability[h], v[0], v[1]);
            multiply_add<T>(acc[g][1], probability[h], v[2], v[3]);
          }
        }
      }
    }
  }

  // One row tile against one split.
  __device__ __forceinline__ void run(const SequenceOfBlock& seq, int s, int first_row, int split) {
    split_begin = split * kSplit;
    const int split_end = split_begin + kSplit;
    const int last_row = first_row + kRows - 1;
    const int last_token = last_row / p.group < seq.tokens ? last_row / p.group : seq.tokens - 1;
    high_rows = first_row + 8 < seq.tokens * p.group;
    first_position = seq.first() + first_row / p.group;
    last_position = seq.first() + last_token;
    range = seen_by(p, seq, first_row / p.group, last_token);
    range.begin = range.begin < split_begin ? split_begin : range.begin;
    range.end = range.end > split_end ? split_end : range.end;
    if (range.begin >= range.end && p.partials) return;  // the combination does not read it
    first_tile = range.begin / kTile;
    tiles = range.begin < range.end ? (range.end + kTile - 1) / kTile - first_tile : 0;
    m[0] = m[1] = -kInfinity;
    l[0] = l[1] = 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[g][h][i] = 0.f;

    block_barrier();  // the previous run is over
    const bool new_rows = row_tile != first_row;
    row_tile = first_row;
    if (new_rows) find_rows(seq);
    find_pages(s);
    block_barrier();
#pragma unroll
    for (int tile = 0; tile < kSlots; ++tile) {
      if (!kAlias || tile < kSlots - 1) copy_keys(tile);
      if (!kAlias && tile < kSlots - 1) copy_values(tile);
    }
    if (new_rows) load_queries();
    for (int tile = 0; tile < tiles; ++tile) {
      copies_wait<kPending>();
      block_barrier();  // keys of the tile are there; values of the one before are done with
      if constexpr (kAlias)
        copy_keys(tile + kSlots - 1);
      else
        copy_values(tile + kSlots - 1);
      float scores[2][4] = {};
      score(scores, tile);
      logits(scores, tile);
      write_maxima(scores);
      if constexpr (!kAlias) copies_wait<kPending>();
      block_barrier();  // values and maxima are there; keys are done with
      if constexpr (!kAlias) copy_keys(tile + kSlots);
      softmax(scores, tile);
      block_barrier();  // P is there
      add_values(tile);
    }
    copies_wait<0>();
    write(split);
  }

  // The sums of the warps in ascending order, then the output or this split's part of it.
  __device__ __forceinline__ void write(int split) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] += from_lane_xor(l[half], 1);
      l[half] += from_lane_xor(l[half], 2);
      if (lane % 4 == 0) of_warp(p.shared.sums_at, lane / 4 + 8 * half) = l[half];
    }
    block_barrier();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half, out = row_info(row).out;
      if (out < 0) continue;
      const float4 sums = of_warps(p.shared.sums_at, row);
      const float sum = sums.x + sums.y + sums.z + sums.w;
      float factor = 1.f;
      const int64_t at = static_cast<int64_t>(split) * p.tokens * p.heads + out;
      if (!p.partials) {
        factor = finish_factor(p, m[half], sum, out % p.heads);
      } else if (warp == 0 && lane % 4 == 0) {
        store(p.stats + 2 * at, m[half]);
        store(p.stats + 2 * at + 1, sum);
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float* low = &acc[g][0][2 * half];
        const float* high = &acc[g][1][2 * half];
        // Columns of the lane: 2 neighbours of each half of the group; of int8, 4 in a row.
        const int first = 16 * (warp + kWarps * g) + lane % 4 * (kCodes ? 4 : 2);
        if (kCodes) {
          write_pair(at, first, low[0] * factor, high[0] * factor);
          write_pair(at, first + 2, low[1] * factor, high[1] * factor);
        } else {
          write_pair(at, first, low[0] * factor, low[1] * factor);
          write_pair(at, first + 8, high[0] * factor, high[1] * factor);
        }
      }
    }
  }
  __device__ __forceinline__ void write_pair(int64_t row, int column, float a, float b) const {
    if (column >= p.value_dim) return;
    const int64_t at = row * p.value_dim + column;
    if (p.partials)
      store(reinterpret_cast<float2*>(p.partials + at), float2{a, b});
    else
      store(reinterpret_cast<uint32_t*>(p.o) + at / 2, pack<T>(a, b));
  }
};

// Blocks of a multiprocessor that shared memory and registers are to allow.
constexpr int blocks_of(bool codes, int groups) {
  return groups == 1 ? 4 : groups == 2 ? (codes ? 4 : 3) : groups == 4 && codes ? 2 : 1;
}

template <class T, bool kCodes, int kGroups, bool kAlias, int kSlots>
__global__ void __launch_bounds__(kThreads, blocks_of(kCodes, kGroups))
    split_kernel(const __grid_constant__ PagedAttentionParams p) {
  const int s = static_cast<int>(blockIdx.z), kv_head = static_cast<int>(blockIdx.y);
  const int row_slot = static_cast<int>(blockIdx.x) % p.row_slots;
  const int split_slot = static_cast<int>(blockIdx.x) / p.row_slots;
  const int split_slots = static_cast<int>(gridDim.x) / p.row_slots;
  const SequenceOfBlock seq = sequence_at(p, s);
  SplitBlock<T, kCodes, kGroups, kAlias, kSlots> block(p, kv_head);
  block.clear_padding();
  const int rows = seq.tokens * p.group;
  for (int row = row_slot * kRows; row < rows; row += p.row_slots * kRows)
    for (int split = split_slot; split < p.splits; split += split_slots) {
      if (p.partials && split * kSplit >= seq.length) break;
      block.run(seq, s, row, split);
    }
}

}  // namespace fastllm::cuda
