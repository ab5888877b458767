// y = x W^T + bias for up to 32 tokens in bf16 and a weight that stays packed (R = 1, the layout
// that Triton's kernels read: one packed weight serves every number of tokens).
//
// The weight is the left operand of mma.m16n8k16: 16 rows of it, 8 tokens. The order of K inside a
// product is free, so lane i of four takes columns 4 i to 4 i + 3: word i of a block of 4-bit codes
// holds them for both halves of the block, and 8 consecutive bytes of x are its share of the right
// operand. So weights go from shared memory to registers as they are, without a reshuffle.
//
// Per chunk (the columns under a scale, at most 128): an exact product of x with the unscaled codes
// in fp32, then one FMA with the scale and one with the minimum; the sum of x, which the minimum
// needs, is the product with ones. Eight warps take the 128-byte segments of a block's rows in turn;
// their sums are added in ascending order, then those of splits: the order depends on the weight's
// shape alone, so a token's bits do not depend on the others.
#pragma once
#include "cuda/quant_codes.cuh"

namespace fastllm::cuda {

template <Codes kCodes, int kTokenTiles, int kRowTiles>
struct ProductBlock {
  static constexpr int kWords = code_words(kCodes);
  static constexpr int kBlocks = kSegmentBytes / (4 * kWords);  // of 32 columns in a segment
  static constexpr bool kMinimum = kCodes == Codes::nibble;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kStages = kRowTiles == 1 ? 4 : 3;
  static constexpr int kStageBytes = kRows * kSegmentBytes;
  static constexpr int kSharedBytes = kProductWarps * kStages * kStageBytes;
  static_assert(kSharedBytes >= kProductWarps * kRows * 8 * kTokenTiles * 4, "sums of all warps");

  const QuantMatmulParams& p;
  const int warp, lane, group, quad;  // lane = 4 group + quad
  const int first_row, first_segment, end_segment;
  const uint32_t ring;  // this warp's stages
  float acc[kRowTiles][kTokenTiles][4];

  __device__ __forceinline__ explicit ProductBlock(const QuantMatmulParams& params)
      : p(params),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32),
        group(lane / 4),
        quad(lane % 4),
        first_row(static_cast<int>(blockIdx.x) * kRows),
        first_segment(static_cast<int>(blockIdx.y) * p.segments_of_split),
        end_segment(first_segment + p.segments_of_split),
        ring(static_cast<uint32_t>(warp * kStages * kStageBytes)),
        acc{} {}

  __device__ __forceinline__ int segment(int step) const {
    return first_segment + warp + kProductWarps * step;
  }
  // A row's 16-byte pieces change places by the row, so that the 8 rows of a fragment lie in
  // different banks.
  static __device__ __forceinline__ uint32_t place(int row, int piece) {
    return static_cast<uint32_t>(row * kSegmentBytes + ((piece ^ (row & 7)) * 16));
  }

  __device__ __forceinline__ void copy_stage(int step) const {
    const int64_t row_bytes = static_cast<int64_t>(p.k) / 32 * (4 * kWords);
    const uint32_t stage = ring + static_cast<uint32_t>(step % kStages * kStageBytes);
    const int at = segment(step);
#pragma unroll
    for (int i = 0; i < kRows * 8 / 32; ++i) {
      const int row = i * 4 + lane / 8, piece = lane % 8;
      const int64_t byte = static_cast<int64_t>(at) * kSegmentBytes + piece * 16;
      const bool keep = at < end_segment && first_row + row < p.n && byte < row_bytes;
      const int64_t from = (first_row + row) * row_bytes + byte;
      copy_16(stage + place(row, piece), p.data + (keep ? from : 0), keep);
    }
    copies_commit();
  }

  // 4 columns of a token as two registers of the right operand; zeros past the ends.
  __device__ __forceinline__ uint2 tokens(int tile, int column) const {
    const int token = 8 * tile + group;
    if (token >= p.m || column >= p.k) return {0u, 0u};
    return load(reinterpret_cast<const uint2*>(p.x + token * p.x_stride + column));
  }

  // Word `word` of block `block` of a row of the stage.
  static __device__ __forceinline__ uint32_t word_at(uint32_t stage, int row, int block, int word) {
    const int byte = block * 4 * kWords + 4 * word;
    return shared_at<uint32_t>(stage + place(row, byte / 16) + static_cast<uint32_t>(byte % 16));
  }

  struct Scaled {  // of the blocks quad and quad + 4 of a segment, for rows group and group + 8
    float d[kRowTiles][2][kBlocks / 4], m[kRowTiles][2][kBlocks / 4];
  };
  __device__ __forceinline__ void load_scales(Scaled& s, int segment) const {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < kBlocks / 4; ++i) {
          const int row = first_row + 16 * tile + 8 * r + group;
          // A chunk that K ends in has the scale of its last block; past it sums are zero.
          const int block = segment * kBlocks + 4 * i + quad, last = p.k / 32 - 1;
          float2 scale{0.f, 0.f};
          if (row < p.n) scale = scale_of(p, row, block < last ? block : last);
          s.d[tile][r][i] = scale.x;
          s.m[tile][r][i] = scale.y;
        }
  }

  struct Chunk {  // sums of x with unscaled codes, and of x
    float dot[kRowTiles][kTokenTiles][4], sum[kTokenTiles][4];
  };

  __device__ __forceinline__ void add_half(Chunk& c, uint32_t stage, int block, int half,
                                           int column) const {
    uint2 x[kTokenTiles];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) x[t] = tokens(t, column + 16 * half + 4 * quad);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      uint32_t low[2], high[2];  // rows group and group + 8
      const int word = kWords == 8 ? 4 * half + quad : quad;
      code_pairs<kCodes>(word_at(stage, 16 * tile + group, block, word), half, low);
      code_pairs<kCodes>(word_at(stage, 16 * tile + group + 8, block, word), half, high);
      const uint32_t a[4] = {low[0], high[0], low[1], high[1]};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) multiply_add<Bf16>(c.dot[tile][t], a, x[t].x, x[t].y);
    }
    if constexpr (kMinimum) {
      const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) multiply_add<Bf16>(c.sum[t], ones, x[t].x, x[t].y);
    }
  }

  __device__ __forceinline__ void finish(Chunk& c, const Scaled& s, int block) {
    const int owner = (lane & ~3) | (block & 3);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float d = from_lane(s.d[tile][r][block / 4], owner);
        float m = 0.f;
        if constexpr (kMinimum) m = from_lane(s.m[tile][r][block / 4], owner);
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            float& sum = acc[tile][t][e];
            sum = fmaf(c.dot[tile][t][e], d, sum);
            if constexpr (kMinimum) sum = fmaf(m, c.sum[t][e], sum);
          }
      }
    c = Chunk{};
  }

  __device__ __forceinline__ void multiply(int step) {
    const uint32_t stage = ring + static_cast<uint32_t>(step % kStages * kStageBytes);
    const int at = segment(step);
    Scaled scales;
    load_scales(scales, at);
    Chunk chunk{};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        add_half(chunk, stage, block, half, (at * kBlocks + block) * 32);
      if (((block + 1) & p.chunk_mask) == 0) finish(chunk, scales, block);
    }
  }

  __device__ __forceinline__ void sum_segments() {
    for (int step = 0; step < kStages - 1; ++step) copy_stage(step);
    for (int step = 0; segment(step) < end_segment; ++step) {
      copies_wait<kStages - 2>();
      warp_barrier();  // the stage is whole, and everyone has read the one that is written next
      copy_stage(step + kStages - 1);
      multiply(step);
    }
    copies_wait<0>();
  }

  // Adds the sums of the warps, one output a thread, rows beside each other.
  __device__ __forceinline__ void store_sums() const {
    constexpr int outputs = kRows * 8 * kTokenTiles;
    block_barrier();
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 16 * tile + group + e / 2 * 8, token = 8 * t + 2 * quad + e % 2;
          shared_at<float>(static_cast<uint32_t>(4 * (warp * outputs + token * kRows + row))) =
              acc[tile][t][e];
        }
    block_barrier();
    for (int i = static_cast<int>(threadIdx.x); i < outputs; i += kProductThreads) {
      const int row = first_row + i % kRows, token = i / kRows;
      if (row >= p.n || token >= p.m) continue;
      float sum = shared_at<float>(static_cast<uint32_t>(4 * i));
      for (int w = 1; w < kProductWarps; ++w)
        sum += shared_at<float>(static_cast<uint32_t>(4 * (w * outputs + i)));
      const int64_t at = static_cast<int64_t>(token) * p.n + row;
      if (p.partials)
        store(p.partials + static_cast<int64_t>(blockIdx.y) * p.m * p.n + at, sum);
      else
        store_output(p, at, row, sum);
    }
  }

  static __device__ __forceinline__ void store_output(const QuantMatmulParams& p, int64_t at,
                                                      int row, float sum) {
    if (p.bias)
      sum += p.bias_bf16 ? from_half<Bf16>(load(static_cast<const uint16_t*>(p.bias) + row))
                         : load(static_cast<const float*>(p.bias) + row);
    if (p.y_bf16)
      store(static_cast<uint16_t*>(p.y) + at, static_cast<uint16_t>(pack<Bf16>(sum, 0.f)));
    else
      store(static_cast<float*>(p.y) + at, sum);
  }
};

template <Codes kCodes, int kTokenTiles, int kRowTiles>
__device__ __forceinline__ void product_rows(const QuantMatmulParams& p) {
  ProductBlock<kCodes, kTokenTiles, kRowTiles> block(p);
  block.sum_segments();
  block.store_sums();
}

// Sums of splits in ascending order, an output a thread.
__device__ __forceinline__ void product_sum_splits(const QuantMatmulParams& p) {
  const int64_t outputs = static_cast<int64_t>(p.m) * p.n;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kProductThreads + threadIdx.x;
  if (at >= outputs) return;
  float sum = load_coherent(p.partials + at);
  for (int split = 1; split < p.splits; ++split)
    sum += load_coherent(p.partials + split * outputs + at);
  ProductBlock<Codes::int8, 1, 1>::store_output(p, at, static_cast<int>(at % p.n), sum);
}

// Calls visit(Product<...>{}) with the instance that serves a call.
template <Codes codes, int tokens, int rows>
struct Product {
  static constexpr Codes kCodes = codes;
  static constexpr int kTokenTiles = tokens, kRowTiles = rows;
  static constexpr int kSharedBytes = ProductBlock<codes, tokens, rows>::kSharedBytes;
};
template <Codes kCodes, int kTokens, class Visit>
void visit_rows(const QuantMatmulCall& call, Visit visit) {
  call.row_tiles == 1 ? visit(Product<kCodes, kTokens, 1>{}) : visit(Product<kCodes, kTokens, 2>{});
}
template <Codes kCodes, class Visit>
void visit_tokens(const QuantMatmulCall& call, Visit visit) {
  if (call.token_tiles == 1) return visit_rows<kCodes, 1>(call, visit);
  if (call.token_tiles == 2) return visit_rows<kCodes, 2>(call, visit);
  visit_rows<kCodes, 4>(call, visit);
}
template <class Visit>
void visit_product(const QuantMatmulCall& call, Visit visit) {
  switch (call.codes) {
    case Codes::nibble_offset: return visit_tokens<Codes::nibble_offset>(call, visit);
    case Codes::nibble: return visit_tokens<Codes::nibble>(call, visit);
    case Codes::nf4: return visit_tokens<Codes::nf4>(call, visit);
    case Codes::int8: return visit_tokens<Codes::int8>(call, visit);
    case Codes::e4m3: return visit_tokens<Codes::e4m3>(call, visit);
  }
}

}  // namespace fastllm::cuda
