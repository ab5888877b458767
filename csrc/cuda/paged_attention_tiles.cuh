// What a block of the first kernel keeps in shared memory (paged_attention_split.cuh):
// its query rows, the pages of a split, and the tiles of K and V under way.
#pragma once
#include "cuda/paged_attention_common.cuh"

namespace fastllm::cuda {

// What shared memory keeps of a query row.
struct alignas(16) RowInfo {
  int64_t q;         // element offset of the row in q
  int32_t out;       // token * heads + head; -1: no such row
  int32_t position;  // of its token
};

// A block's rows and tiles. kCodes: int8 caches. kGroups: groups of 16 value columns of a warp, and
// of 64 dimensions of a key. kAlias: values are the first columns of the keys' rows, and a slot is
// freed by both products.
template <class T, bool kCodes, int kGroups, bool kAlias, int kSlots>
struct SplitTiles {
  static constexpr int kElementBytes = kCodes ? 1 : 2;
  static constexpr int kPending = kAlias ? kSlots - 2 : 2 * kSlots - 2;  // copies under way
  static constexpr int kKeyGroups = kAlias ? kGroups + 1 : kGroups;
  // Pairs of chunks of a key's row at most, and chunks that one of 8 threads copies of it.
  static constexpr int kPairs = kKeyGroups * 2 * kElementBytes;
  static constexpr int kCopies = (kKeyGroups * kElementBytes + 1) / 2;

  // A row that a lane addresses. `x` exchanges the places of its chunks, in bytes: those of chunk c
  // (even; the lane's odd bit is in x) start at c / 8 * 128 + (c % 8 * 16 ^ x).
  struct LaneRow {
    uint32_t base, x;
    __device__ __forceinline__ LaneRow(const RowLayout& layout, int row, int chunk)
        : base(row * layout.chunks * kChunk),
          x((chunk ^ (row >> layout.shift & layout.mask)) * kChunk) {}
    __device__ __forceinline__ uint32_t at(int c) const {
      return base + c / 8 * (8 * kChunk) + ((c % 8 * kChunk) ^ x);
    }
  };

  const PagedAttentionParams& p;
  const int kv_head, thread, warp, lane;
  // ldmatrix: lane l addresses row l % 8 of matrix l / 8. Matrices of Q and P: rows 0, 8, 0, 8 of
  // chunks 0, 0, 1, 1; of K: rows 0, 0, 8, 8 of chunks 0, 1, 0, 1; of V: rows 0, 8, 0, 8 of chunks
  // 0, 0, 1, 1, or for codes, a chunk being 16 columns: rows 0, 8, 16, 24 of one chunk.
  const LaneRow q_lane, p_lane, k_lane, v_lane;
  // Of the present split and row tile; positions of the tile's first and last token.
  int row_tile = -1, split_begin = 0, first_tile = 0, tiles = 0;
  int first_position = 0, last_position = 0;
  bool high_rows = false;  // rows 8 to 15 of the tile exist: where not, nothing is done for them
  Range range{};

  __device__ __forceinline__ SplitTiles(const PagedAttentionParams& params, int head)
      : p(params),
        kv_head(head),
        thread(static_cast<int>(threadIdx.x)),
        warp(thread / 32),
        lane(thread % 32),
        q_lane(params.shared.q, lane % 16, lane / 16),
        p_lane(p_layout(), lane % 16, lane / 16),
        k_lane(params.shared.k, 16 * warp + lane / 16 * 8 + lane % 8, lane / 8 % 2),
        v_lane(params.shared.v, kCodes ? lane : lane % 16, kCodes ? warp : 2 * warp + lane / 16) {}

  __device__ __forceinline__ static RowLayout p_layout() { return {kTile * 2 / kChunk, 0, 7}; }
  // Where each 16 positions of the split lie: a row of [num_pages * kv_heads * page_size], or -1.
  __device__ __forceinline__ int32_t& page_row(int i) const {
    return shared_at<int32_t>(p.shared.pages_at + i * 4);
  }
  __device__ __forceinline__ int page_index(int position) const {
    return static_cast<unsigned>(position - split_begin) / 16;
  }
  __device__ __forceinline__ RowInfo& row_info(int i) const {
    return shared_at<RowInfo>(p.shared.rows_at + i * 16);
  }
  __device__ __forceinline__ static uint32_t place(const RowLayout& layout, int row, int chunk) {
    return (row * layout.chunks + (chunk ^ (row >> layout.shift & layout.mask))) * kChunk;
  }

  // Rows of q and of the output.
  __device__ __forceinline__ void find_rows(const SequenceOfBlock& seq) const {
    if (thread >= kRows) return;
    const int row = row_tile + thread, token = row / p.group;
    const bool live = token < seq.tokens;
    const int head = kv_head * p.group + row % p.group;
    const int64_t t = seq.begin + token;
    row_info(thread) = {live ? t * p.q_token_stride + head * p.q_head_stride : 0,
                        live ? static_cast<int32_t>(t * p.heads + head) : -1,
                        live ? seq.first() + token : kNever};
  }
  __device__ __forceinline__ void find_pages(int s) const {
    const int i = thread - 32;  // another warp than find_rows
    if (i < 0 || i >= kPagesOfSplit) return;
    const int position = split_begin + 16 * i;
    int at = -1;
    if (position < range.end && position + 16 > range.begin) {
      const int column = position / p.page_size;
      const int page = load(p.block_table + s * p.table_stride + column);
      if (page >= 0 && page < p.num_pages)
        at = (page * p.kv_heads + kv_head) * p.page_size + position % p.page_size;
    }
    page_row(i) = at;
  }

  // Q into shared memory, zeros in rows that do not exist and past its last dimension.
  __device__ __forceinline__ void load_queries() const {
    const auto* q = static_cast<const uint16_t*>(p.q);
    for (int row = warp; row < kRows; row += kWarps) {
      const RowInfo info = row_info(row);
#pragma unroll 4
      for (int d = lane; d < 16 * p.k_steps; d += 32) {
        uint16_t x = 0;
        if (info.out >= 0 && d < p.dim) x = load(q + info.q + d);
        int k = d % 16;  // where the product looks for this dimension
        if (kCodes) k = k % 4 / 2 * 8 + k / 4 * 2 + k % 2;
        shared_at<uint16_t>(p.shared.q_at + place(p.shared.q, row, d / 16 * 2 + k / 8) +
                            k % 8 * 2) = x;
      }
    }
  }

  // Chunks past K's last dimension are never copied to, but multiplied (by the zeros of Q).
  __device__ __forceinline__ void clear_padding() const {
    const int chunks = p.dim * kElementBytes / kChunk;
    if (chunks == p.shared.k.chunks) return;
    for (int row = thread; row < kTile; row += kThreads)
      for (int slot = 0; slot < kSlots; ++slot)
        shared_at<uint4>(slot * p.shared.k_slot + place(p.shared.k, row, chunks)) =
            uint4{0, 0, 0, 0};
  }

  // Starts the copies of one tile. 8 threads take a row of 16-byte chunks, 16 rows at once; their
  // 16 positions lie in one page. What no row sees is zero: 0 * NaN would reach the output.
  __device__ __forceinline__ void copy_tile(int tile, const void* cache, const float* scales,
                                            uint32_t slot, const RowLayout& layout,
                                            int chunks) const {
    const int begin = (first_tile + tile) * kTile, row = thread / 8, chunk = thread % 8;
    const int4 pages = shared_at<int4>(p.shared.pages_at + page_index(begin) * 4);
    const int32_t page_of[4] = {pages.x, pages.y, pages.z, pages.w};
    const auto* bytes = static_cast<const char*>(cache) + chunk * kChunk;
    const uint32_t row_bytes = chunks * kChunk;
    const uint32_t to = slot + LaneRow(layout, row, chunk).at(0);
#pragma unroll
    for (int pass = 0; pass < kTile / 16; ++pass) {
      const int position = begin + pass * 16 + row, page = page_of[pass];
      const bool keep = page >= 0 && position >= range.begin && position < range.end;
      const char* from = bytes + static_cast<uint64_t>(keep ? page + row : 0) * row_bytes;
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        if (chunk + 8 * i < chunks)
          copy_16(to + pass * 16 * layout.chunks * kChunk + i * 8 * kChunk, from + i * 8 * kChunk,
                  keep);
    }
    if (kCodes && thread < kTile) {
      const int page = page_row(page_index(begin) + thread / 16);
      const int position = begin + thread;
      const bool keep = page >= 0 && position >= range.begin && position < range.end;
      copy_4(slot + kTile * kChunk * layout.chunks + thread * 4,
             scales + (keep ? page + thread % 16 : 0), keep);
    }
  }
  __device__ __forceinline__ uint32_t k_slot(int tile) const {
    return tile % kSlots * p.shared.k_slot;
  }
  __device__ __forceinline__ uint32_t v_slot(int tile) const {
    return kAlias ? k_slot(tile) : p.shared.v_at + tile % kSlots * p.shared.v_slot;
  }
  // Scales of this lane's positions 8 n + 2 (lane % 4) of its warp's 16, and of the next one.
  __device__ __forceinline__ float2 scales_of(uint32_t slot, const RowLayout& layout, int n) const {
    return shared_at<float2>(slot + kTile * kChunk * layout.chunks +
                             (16 * warp + 8 * n + lane % 4 * 2) * 4);
  }
  // Each commits, also past the last tile: waits count commits.
  __device__ __forceinline__ void copy_keys(int tile) const {
    if (tile < tiles)
      copy_tile(tile, p.k_cache, p.k_scales, k_slot(tile), p.shared.k,
                p.dim * kElementBytes / kChunk);
    copies_commit();
  }
  __device__ __forceinline__ void copy_values(int tile) const {
    if (tile < tiles)
      copy_tile(tile, p.v_cache, p.v_scales, v_slot(tile), p.shared.v,
                p.value_dim * kElementBytes / kChunk);
    copies_commit();
  }
};

}  // namespace fastllm::cuda
