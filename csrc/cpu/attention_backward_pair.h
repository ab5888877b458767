// Attention's backward, from packed tiles: which tiles see each other, what a thread keeps of them,
// and the five products of a pair. See attention_backward.cpp.
#pragma once
#include "common/scratch.h"
#include "cpu/attention_backward_tile.h"
#include "cpu/integers.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int64_t kKeyTiles = 4;            // of a block, at most
constexpr int64_t kQueryTiles = 4;          // of a task for dQ
constexpr int64_t kBlockBytes = 512 << 10;  // of key tiles: they share a 1 MB L2 with a query tile

// Queries [q_begin, q_begin + queries) and keys [k_begin, k_begin + keys) of one batch.
struct Document {
  int64_t index, batch, q_begin, queries, k_begin, keys;
  int64_t offset() const { return keys - queries; }  // the key position of query 0
};
FASTLLM_INLINE Document document_at(const AttentionBackwardArgs& a, int64_t s) {
  if (!a.cu_seqlens_q) return {s, s, 0, a.queries, 0, a.keys};
  // The values are read when the kernel runs: whatever they are, nothing lies outside its tensor.
  const int64_t q = clamped(a.cu_seqlens_q[s], 0, a.queries);
  const int64_t k = clamped(a.cu_seqlens_k[s], 0, a.keys);
  return {s, 0,
          q, clamped(a.cu_seqlens_q[s + 1], q, a.queries) - q,
          k, clamped(a.cu_seqlens_k[s + 1], k, a.keys) - k};
}

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};
// The queries of a document that see some key of a span by its windows, and the other way round.
FASTLLM_INLINE Span queries_of(const AttentionBackwardArgs& a, const Document& d, Span keys) {
  if (keys.empty()) return {0, 0};
  return {
      a.window_right < 0 ? 0 : larger(0, keys.begin - a.window_right - d.offset()),
      a.window_left < 0 ? d.queries : smaller(d.queries, keys.end + a.window_left - d.offset())};
}
FASTLLM_INLINE Span keys_of(const AttentionBackwardArgs& a, const Document& d, Span queries) {
  if (queries.empty()) return {0, 0};
  return {a.window_left < 0 ? 0 : larger(0, queries.begin + d.offset() - a.window_left),
          a.window_right < 0 ? d.keys : smaller(d.keys, queries.end + d.offset() + a.window_right)};
}

template <class E>
struct QueryTile {
  typename E::Word *q_across, *q_along, *do_across, *do_along;
  float *lse,
      *delta;  // [kQueries]; lse in base E::kBase, +inf for dead rows and those past the end
  int64_t head, first, rows;
};
template <class E>
struct KeyTile {
  typename E::Word *k_across, *k_along, *v_across;
  float *dk, *dv;  // [kTile][stride]
  uint8_t* seen;   // [kTile]
  bool all_seen, some_seen;
  int64_t first, keys;
};

// Hands out the parts of one allocation; with a null base it measures them.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};
// A thread's tiles of queries and keys, and what is done with them.
template <class E>
struct BackwardTiles {
  using Elem = typename E::Elem;
  using Word = typename E::Word;

  const AttentionBackwardArgs& a;
  int64_t group, q_stride, v_stride;  // strides: D and Dv rounded up to whole vectors
  int64_t q_words, v_words;           // packed words of a tile along its rows
  Logits logits;
  int64_t block_tiles;
  TileBuffers<E> t{};
  Word* slab = nullptr;
  QueryTile<E> query[kQueryTiles]{};
  KeyTile<E> key[kKeyTiles]{};
  float* dq[kQueryTiles]{};
  float* dq_rows = nullptr;

  explicit BackwardTiles(const AttentionBackwardArgs& args) : a(args) {
    group = a.heads / a.kv_heads;
    q_stride = round_up(a.dim, VL);
    v_stride = round_up(a.value_dim, VL);
    q_words = padded_dim(a.dim) * kQueries / E::kPair;
    v_words = padded_dim(a.value_dim) * kQueries / E::kPair;
    logits.scale = a.scale * E::kBase;
    logits.to_cap = a.softcap > 0 ? a.scale / a.softcap : 0.f;
    logits.cap = a.softcap * E::kBase;
    const int64_t bytes = (2 * q_words + v_words + kTile * (q_stride + v_stride)) * 4;
    block_tiles = clamped(kBlockBytes / bytes, 1, kKeyTiles);
  }

  void take_query(Carver& c, QueryTile<E>& q) const {
    q.q_across = c.take<Word>(kQueries * a.dim / E::kPair);
    q.q_along = c.take<Word>(q_words);
    q.do_across = c.take<Word>(kQueries * a.value_dim / E::kPair);
    q.do_along = c.take<Word>(v_words);
    q.lse = c.take<float>(kQueries);
    q.delta = c.take<float>(kQueries);
  }
  void take_key(Carver& c, KeyTile<E>& k, bool gradients) const {
    k.k_across = c.take<Word>(kTile * a.dim / E::kPair);
    k.k_along = c.take<Word>(q_words);
    k.v_across = c.take<Word>(kTile * a.value_dim / E::kPair);
    k.seen = c.take<uint8_t>(kTile);
    if (!gradients) return;
    k.dk = c.take<float>(kTile * q_stride);
    k.dv = c.take<float>(kTile * v_stride);
  }
  // The buffers of a thread: `queries` and `keys` tiles, a dQ tile for each query tile or a region
  // of dq_floats for all of a task.
  void allocate(int64_t queries, int64_t keys, bool key_gradients, bool query_gradients,
                int64_t dq_floats) {
    Carver c{nullptr};
    for (int pass = 0; pass < 2; ++pass) {
      c.used = 0;
      t.s = c.take<float[kQueries]>(kRows);
      t.dp = c.take<float[kQueries]>(kRows);
      t.p = c.take<Word[kQueries / E::kPair]>(kTile);
      t.ds = c.take<Word[kQueries / E::kPair]>(kTile);
      t.ds_pairs = E::kPair == 1 ? reinterpret_cast<Word(*)[kQueries]>(t.ds)
                                 : c.take<Word[kQueries]>(kTile / E::kPair);
      slab = c.take<Word>(kSlab * padded_dim(larger(a.dim, a.value_dim)) / E::kPair);
      for (int64_t i = 0; i < queries; ++i) take_query(c, query[i]);
      for (int64_t i = 0; i < keys; ++i) take_key(c, key[i], key_gradients);
      if (query_gradients)
        for (int64_t i = 0; i < queries; ++i) dq[i] = c.take<float>(kQueries * q_stride);
      dq_rows = c.take<float>(dq_floats);
      if (pass == 0) c.base = static_cast<char*>(thread_scratch(Scratch::panels, c.used));
    }
  }

  const Elem* row(const BatchRows& x, const Document& d, int64_t at, int64_t head) const {
    return static_cast<const Elem*>(x.data) + d.batch * x.batch_stride + at * x.token_stride +
           head * x.head_stride;
  }
  // Where lse and delta of a document and head begin.
  int64_t statistics(const Document& d, int64_t head) const {
    return (d.batch * a.heads + head) * a.queries + d.q_begin;
  }

  void load_query(QueryTile<E>& q, const Document& d, int64_t head, int64_t first) {
    q.head = head;
    q.first = first;
    q.rows = smaller(kQueries, d.queries - first);
    uint8_t alive[kQueries];
    const float* lse = a.lse + statistics(d, head) + first;
    const float* delta = a.delta + statistics(d, head) + first;
    for (int64_t r = 0; r < kQueries; ++r) {
      alive[r] = r < q.rows && lse[r] != -__builtin_inff();
      q.lse[r] = alive[r] ? lse[r] * E::kBase : __builtin_inff();
      q.delta[r] = alive[r] ? delta[r] : 0.f;
    }
    pack_rows<E, kWide>(q.q_across, q.q_along, slab, row(a.q, d, d.q_begin + first, head),
                        a.q.token_stride, q.rows, a.dim, alive);
    pack_rows<E, kWide>(q.do_across, q.do_along, slab, row(a.grad_o, d, d.q_begin + first, head),
                        a.grad_o.token_stride, q.rows, a.value_dim, alive);
  }

  // Asks for the rows of a tile that comes next: they lie pages apart, where the hardware does not
  // look ahead.
  void prefetch_query(const Document& d, int64_t head, int64_t first) const {
    const int64_t end = smaller(d.queries, first + kQueries);
    for (int64_t i = first; i < end; ++i) {
      const Elem *q = row(a.q, d, d.q_begin + i, head), *x = row(a.grad_o, d, d.q_begin + i, head);
      constexpr int64_t kLine = 64 / sizeof(Elem);
      for (int64_t c = 0; c < a.dim; c += kLine) _mm_prefetch(q + c, _MM_HINT_T1);
      for (int64_t c = 0; c < a.value_dim; c += kLine) _mm_prefetch(x + c, _MM_HINT_T1);
    }
  }

  void load_key(KeyTile<E>& k, const Document& d, int64_t kv_head, int64_t tile) {
    k.first = tile * kTile;
    k.keys = smaller(kTile, d.keys - k.first);
    const Span visible = keys_of(a, d, {0, d.queries});
    const uint8_t* mask = a.key_mask ? a.key_mask + d.batch * a.keys + d.k_begin : nullptr;
    k.all_seen = true;
    k.some_seen = false;
    for (int64_t n = 0; n < kTile; ++n) {
      const int64_t at = k.first + n;
      const bool seen =
          n < k.keys && at >= visible.begin && at < visible.end && (!mask || mask[at]);
      k.seen[n] = seen;
      k.all_seen &= seen;
      k.some_seen |= seen;
    }
    if (!k.some_seen) return;
    pack_rows<E, kRows>(k.k_across, k.k_along, slab, row(a.k, d, d.k_begin + k.first, kv_head),
                        a.k.token_stride, k.keys, a.dim, k.seen);
    pack_rows<E, kRows>(k.v_across, nullptr, slab, row(a.v, d, d.k_begin + k.first, kv_head),
                        a.v.token_stride, k.keys, a.value_dim, k.seen);
  }

  // Which part of a pair of tiles is computed: a range of lanes for every kRows keys, the keys for
  // every kRows queries, and, if some of it is hidden, the lanes that see each key.
  struct Window {
    Range lanes[kTile / kRows], keys[kQueries / kRows];
    int low[kTile], high[kTile];
    bool masked;
  };
  void find_window(Window& w, const Document& d, const QueryTile<E>& q, const KeyTile<E>& k) const {
    const int64_t base = k.first - d.offset() - q.first;  // the lane at the position of key 0
    const int key_groups = static_cast<int>(divide_up(k.keys, kRows));
    const int end = static_cast<int>(round_up(q.rows, kWide));
    w.masked = !k.all_seen || (a.window_right >= 0 && base + kTile - 1 > a.window_right) ||
               (a.window_left >= 0 && q.rows - 1 > base + a.window_left);
    for (int n = 0; n < kTile; ++n) {
      const int64_t low = a.window_right < 0 ? 0 : base + n - a.window_right;
      const int64_t high = a.window_left < 0 ? kQueries : base + n + a.window_left + 1;
      w.low[n] = static_cast<int>(clamped(low, 0, kQueries));
      w.high[n] = static_cast<int>(clamped(high, 0, kQueries));
    }
    for (int g = 0; g < kTile / kRows; ++g) {
      const int high = static_cast<int>(round_up(w.high[(g + 1) * kRows - 1], kWide));
      w.lanes[g] = {w.low[g * kRows] / kWide * kWide, high < end ? high : end};
      if (g >= key_groups || w.lanes[g].begin > w.lanes[g].end) w.lanes[g] = {0, 0};
    }
    for (int r = 0; r < kQueries / kRows; ++r) {
      w.keys[r] = {0, 0};
      for (int g = 0; g < key_groups; ++g)
        if (w.lanes[g].begin <= r * kRows && r * kRows < w.lanes[g].end) {
          if (w.keys[r].end == 0) w.keys[r].begin = g * kRows / E::kPair;
          w.keys[r].end = (g + 1) * kRows / E::kPair;
        }
    }
    for (int n = 0; n < kTile; ++n)
      if (!k.seen[n]) w.high[n] = 0;
  }

  // One pair of tiles; adds to dK and dV of the key tile if asked to, and to a dQ tile if given.
  void pair(const Document& d, const QueryTile<E>& q, const KeyTile<E>& k, bool to_keys,
            float* to_query) {
    const Span seen_by = queries_of(a, d, {k.first, k.first + k.keys});
    if (!k.some_seen || seen_by.begin >= q.first + q.rows || seen_by.end <= q.first) return;
    Window w;
    find_window(w, d, q, k);
    const auto gradients = gradient_kernel<E>(w.masked, a.softcap > 0);
    const int64_t q_steps = a.dim / E::kPair, v_steps = a.value_dim / E::kPair;
    for (int g = 0; g < kTile / kRows; ++g) {
      const Range lanes = w.lanes[g];
      if (lanes.begin >= lanes.end) continue;
      score_rows<E>(t.s, k.k_across + g * kRows * q_steps, q.q_across, q_steps, lanes.begin,
                    lanes.end);
      score_rows<E>(t.dp, k.v_across + g * kRows * v_steps, q.do_across, v_steps, lanes.begin,
                    lanes.end);
      gradients(t, logits, q.lse, q.delta, g * kRows, lanes.begin, lanes.end, w.low + g * kRows,
                w.high + g * kRows);
      w.lanes[g] = {lanes.begin / E::kPair, lanes.end / E::kPair};
    }
    constexpr int kRowWords = kQueries / E::kPair;
    if (to_keys) {
      add_product<E, kRowWords, 1>(k.dv, v_stride, t.p[0], q.do_along, a.value_dim, w.lanes,
                                   kTile / kRows);
      add_product<E, kRowWords, 1>(k.dk, q_stride, t.ds[0], q.q_along, a.dim, w.lanes,
                                   kTile / kRows);
    }
    if (to_query)
      add_product<E, 1, kQueries>(to_query, q_stride, t.ds_pairs[0], k.k_along, a.dim, w.keys,
                                  static_cast<int>(divide_up(q.rows, kRows)));
  }

  static void store_row(Elem* to, const float* from, float scale, int64_t dim) {
    int64_t i = 0;
    for (; i + VL <= dim; i += VL) store(to + i, vload(from + i) * scale);
    if (i < dim) store_n(to + i, vload(from + i) * scale, dim - i);
  }
  void store_keys(const KeyTile<E>& k, const Document& d, int64_t kv_head) const {
    for (int64_t n = 0; n < k.keys; ++n) {
      const int64_t at = (d.batch * a.keys + d.k_begin + k.first + n) * a.kv_heads + kv_head;
      Elem* dk = static_cast<Elem*>(a.dk) + at * a.dim;
      Elem* dv = static_cast<Elem*>(a.dv) + at * a.value_dim;
      if (k.seen[n]) {
        store_row(dk, k.dk + n * q_stride, a.scale, a.dim);
        store_row(dv, k.dv + n * v_stride, 1.f, a.value_dim);
      } else {
        __builtin_memset(dk, 0, a.dim * sizeof(Elem));
        __builtin_memset(dv, 0, a.value_dim * sizeof(Elem));
      }
    }
  }
  void store_queries(const float* from, const Document& d, int64_t head, Span rows) const {
    const float* lse = a.lse + statistics(d, head);
    for (int64_t i = rows.begin; i < rows.end; ++i, from += q_stride) {
      const int64_t at = (d.batch * a.queries + d.q_begin + i) * a.heads + head;
      Elem* to = static_cast<Elem*>(a.dq) + at * a.dim;
      if (lse[i] == -__builtin_inff())
        __builtin_memset(to, 0, a.dim * sizeof(Elem));
      else
        store_row(to, from, a.scale, a.dim);
    }
  }
};

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
