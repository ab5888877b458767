// What the paged attention kernels are given, and where their shared memory lies. Plain C++: the
// launcher fills it, kernels and their CPU emulation read it.
#pragma once
#include <cstdint>

#include "common/tensor.h"

namespace fastllm::cuda {

constexpr int kSplit = 512;  // positions of a split, merged in ascending order
constexpr int kTile = 64;    // positions of a tile of K or V
constexpr int kRows = 16;    // query rows of a block: the M of the matrix product
constexpr int kWarps = 4;    // a warp scores 16 positions of a tile, and owns a quarter of Dv
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 16;  // bytes of a copy; pages hold a multiple of 16 positions
constexpr int kPagesOfSplit = kSplit / 16;

// 16-byte chunks of a row; chunk c of row r lies at place c ^ swizzle(r), so that the same chunk of
// 8 rows, which ldmatrix reads at once, lies in 8 different groups of banks. `chunks` is even.
struct RowLayout {
  int32_t chunks, shift, mask;
};
inline RowLayout row_layout(int64_t chunks) {
  int power = 0;
  while (power < 3 && chunks % (2 << power) == 0) ++power;
  return {static_cast<int32_t>(chunks), 3 - power, (1 << power) - 1};
}

// Byte offsets in shared memory. The ring of K slots comes first, then that of V slots; a slot
// holds a tile and, of int8 caches, its scales behind it.
struct SharedLayout {
  RowLayout q, k, v;
  int32_t k_slot, v_slot;  // bytes
  int32_t v_at, q_at, p_at, maxima_at, sums_at, pages_at, rows_at, bytes;
};

struct PagedAttentionParams {
  void* o;          // [tokens, heads, value_dim]
  float* partials;  // [splits, tokens, heads, value_dim]; null: one split, o is written at once
  float* stats;     // [splits, tokens, heads, 2]: maximum and sum
  const void *q, *k_cache, *v_cache;
  const float *k_scales, *v_scales;  // [num_pages, kv_heads, page_size] of int8 caches
  const float* sinks;                // [heads] or null
  const int32_t *block_table, *cu_seqlens, *cache_seqlens;
  int64_t table_stride, q_token_stride, q_head_stride;
  int32_t table_width, tokens, num_pages, page_size, capacity;  // capacity: positions of the table
  int32_t heads, kv_heads, group, dim, value_dim;
  int32_t window_left;    // -1: no window
  int32_t splits;         // ceil(capacity / kSplit)
  int32_t row_slots;      // blocks that share the row tiles of a sequence
  int32_t k_steps;        // 16 dimensions each
  float scale_log2;       // softmax_scale * log2(e)
  float cap_in, cap_out;  // logit = cap_out * tanh(score * cap_in / (2 log2 e)); cap_out 0: no cap
  SharedLayout shared;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// `element`: bytes of a cache element. `alias`: values are the first columns of the keys' rows.
inline SharedLayout shared_layout(const PagedAttentionParams& p, int64_t element, int32_t stages,
                                  bool alias) {
  const int32_t scales = element == 1 ? kTile * 4 : 0;
  SharedLayout s;
  s.q = row_layout(2 * p.k_steps);
  s.k = row_layout(round_up(p.dim * element, 2 * kChunk) / kChunk);
  s.v = alias ? s.k : row_layout(round_up(p.value_dim * element, 2 * kChunk) / kChunk);
  s.k_slot = kTile * kChunk * s.k.chunks + scales;
  s.v_slot = alias ? 0 : kTile * kChunk * s.v.chunks + scales;
  s.v_at = stages * s.k_slot;
  s.q_at = s.v_at + stages * s.v_slot;
  s.p_at = s.q_at + kRows * s.q.chunks * kChunk;
  s.maxima_at = s.p_at + kRows * kTile * 2;
  s.sums_at = s.maxima_at + kWarps * kRows * 4;
  s.pages_at = s.sums_at + kWarps * kRows * 4;
  s.rows_at = s.pages_at + kPagesOfSplit * 4;
  s.bytes = s.rows_at + kRows * 16;
  return s;
}

// Blocks of the first kernel are (row slots * split slots, kv heads, sequences). Row tiles beyond
// the slots are taken in turn.
inline int64_t row_slots_of(int64_t sequences, int64_t tokens, int64_t group) {
  const int64_t of_each = divide_up(tokens, sequences > 0 ? sequences : 1);
  const int64_t tiles = divide_up(of_each * group, kRows);
  return tiles < 1 ? 1 : tiles > 64 ? 64 : tiles;
}
// A block takes every `split slots`-th split of its sequence. About 4,096 blocks: ten waves of a
// large GPU, so that the last, partial one is a small part; and a table made for long sequences
// does not launch a block for each of its empty splits (an empty block holds its place for about 1
// us: the 131,072 of 64 sequences x 8 heads x 131,072 positions would take 300 us).
inline int64_t split_slots_of(const PagedAttentionParams& p, int64_t sequences) {
  const int64_t wanted = divide_up(4096, sequences * p.kv_heads * p.row_slots);
  return wanted < p.splits ? wanted : p.splits;
}

// A checked call: the parameters and what chooses the instance of the kernel.
struct PagedAttentionCall {
  PagedAttentionParams p;
  DType dtype;  // of q and o
  bool codes;   // int8 caches
  bool alias;   // v_cache is the first columns of k_cache
  int32_t sequences;
};
constexpr int kStages = 2;  // slots of K and as many of V: three to four tiles are under way

// None arrives as a Tensor that is not given. o [T, H, Dv], q [T, H, D]: bf16 or fp16; caches
// [num_pages, Hk, page_size, D | Dv] of q's dtype, or int8 with k_scales and v_scales f32
// [num_pages, Hk, page_size]; partials: f32 of at least splits * T * H * (Dv + 2), not needed where
// the table holds one split. Throws std::invalid_argument.
PagedAttentionCall paged_attention_call(Tensor o, Tensor q, Tensor k_cache, Tensor v_cache,
                                        Tensor block_table, Tensor cu_seqlens, Tensor cache_seqlens,
                                        Tensor k_scales, Tensor v_scales, Tensor sinks,
                                        Tensor partials, double scale, int64_t window_left,
                                        double softcap);

struct GridSize {
  unsigned x, y, z;
};
inline GridSize split_grid(const PagedAttentionCall& call) {
  const int64_t slots = call.p.row_slots * split_slots_of(call.p, call.sequences);
  return {static_cast<unsigned>(slots), static_cast<unsigned>(call.p.kv_heads),
          static_cast<unsigned>(call.sequences)};
}
inline GridSize combine_grid(const PagedAttentionCall& call) {
  const int64_t tokens = divide_up(call.p.tokens, call.sequences);
  return {static_cast<unsigned>(call.p.heads), static_cast<unsigned>(call.sequences),
          static_cast<unsigned>(tokens < 1024 ? tokens : 1024)};
}

// Queues both kernels on a CUDA stream of the current device. Throws std::runtime_error.
void paged_attention(const PagedAttentionCall& call, void* stream);

}  // namespace fastllm::cuda
