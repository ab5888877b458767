// Gradients of attention, from the log-sum-exp of the forward: five products for every pair of a
// tile of 64 queries and a tile of 64 keys.
//   S = Q K^T    dP = dO V^T    P = exp(scale S - lse)    dS = P (dP - delta)
//   dV += P^T dO    dK += scale dS^T Q    dQ += scale dS K
// with delta = rowsum(dO O) - grad_lse, a first pass. Bound by the dots; operands are packed on the
// way, once for each block of key tiles and query tile, and need no memory of the length.
//
// One pass: a task is a KV head of a document. A block of key tiles with its dK and dV stays in L2
// while the query tiles that see it pass by, whose dQ is summed in memory. Where such tasks are too
// few for the threads, dK, dV and dQ come from tasks of their own (seven products instead of five):
// blocks of key tiles, and blocks of query tiles. Both do the same operations in the same order:
//   dK, dV of a key tile: heads ascending, then query tiles ascending
//   dQ of a query tile:   key tiles ascending
// every tile's product summed from zero and then added. Tiles are counted from the document's first
// query and first key. So a document's bits depend on neither threads nor its neighbours.
#include <type_traits>

#include "common/scratch.h"
#include "cpu/attention_backward_tile.h"
#include "cpu/integers.h"
#include "cpu/lse.h"
#include "ops.h"

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

template <class E>
struct Backward {
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

  explicit Backward(const AttentionBackwardArgs& args) : a(args) {
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

  // dK and dV of a block of key tiles; dQ too where a region [group][rows] of it is given.
  void run_keys(const Document& d, int64_t kv_head, int64_t first_tile, int64_t tiles,
                float* dq_region, int64_t dq_rows_of_head) {
    for (int64_t i = 0; i < tiles; ++i) {
      load_key(key[i], d, kv_head, first_tile + i);
      __builtin_memset(key[i].dk, 0, kTile * q_stride * sizeof(float));
      __builtin_memset(key[i].dv, 0, kTile * v_stride * sizeof(float));
    }
    const Span seen_by =
        queries_of(a, d, {first_tile * kTile, smaller(d.keys, (first_tile + tiles) * kTile)});
    for (int64_t h = 0; h < group; ++h)
      for (int64_t at = seen_by.begin / kQueries * kQueries; at < seen_by.end; at += kQueries) {
        const int64_t head = kv_head * group + h;
        load_query(query[0], d, head, at);
        if (at + kQueries < seen_by.end)
          prefetch_query(d, head, at + kQueries);
        else if (h + 1 < group)
          prefetch_query(d, head + 1, seen_by.begin / kQueries * kQueries);
        float* to = dq_region ? dq_region + (h * dq_rows_of_head + at) * q_stride : nullptr;
        for (int64_t i = 0; i < tiles; ++i) pair(d, query[0], key[i], true, to);
      }
    for (int64_t i = 0; i < tiles; ++i) store_keys(key[i], d, kv_head);
  }

  int64_t key_tiles(const Document& d) const { return divide_up(d.keys, kTile); }
  int64_t query_tiles(const Document& d) const { return divide_up(d.queries, kQueries); }

  // The whole of a KV head in one pass.
  void run_head(const Document& d, int64_t kv_head) {
    const int64_t rows = round_up(d.queries, kRows), floats = group * rows * q_stride;
    float* region = dq_rows;
    if (floats * 4 > kThreadGradientBytes)
      region = a.dq_sums + ((d.batch * a.queries + d.q_begin + kRows * d.index) * a.heads +
                            kv_head * group * rows) *
                               q_stride;
    __builtin_memset(region, 0, floats * sizeof(float));
    for (int64_t tile = 0; tile < key_tiles(d); tile += block_tiles)
      run_keys(d, kv_head, tile, smaller(block_tiles, key_tiles(d) - tile), region, rows);
    for (int64_t h = 0; h < group; ++h)
      store_queries(region + h * rows * q_stride, d, kv_head * group + h, {0, d.queries});
  }

  // dQ of up to kQueryTiles query tiles of a KV head, numbered tile * group + head.
  void run_queries(const Document& d, int64_t kv_head, int64_t first, int64_t count) {
    Span seen{d.keys, 0};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + i) / group * kQueries;
      load_query(query[i], d, kv_head * group + (first + i) % group, at);
      __builtin_memset(dq[i], 0, kQueries * q_stride * sizeof(float));
      const Span keys = keys_of(a, d, {at, at + query[i].rows});
      seen = {smaller(seen.begin, keys.begin), larger(seen.end, keys.end)};
    }
    for (int64_t tile = seen.begin / kTile; tile * kTile < seen.end; ++tile) {
      load_key(key[0], d, kv_head, tile);
      for (int64_t i = 0; i < count; ++i) pair(d, query[i], key[0], false, dq[i]);
    }
    for (int64_t i = 0; i < count; ++i)
      store_queries(dq[i], d, query[i].head, {query[i].first, query[i].first + query[i].rows});
  }

  // Where a row sees one key, delta is to cancel its dP: for f32 it is summed in fp64, which leaves
  // the rounding of dP alone.
  static float dot(const Elem* x, const Elem* y, int64_t n) {
    using Sum = std::conditional_t<E::kPair == 1 && sizeof(Elem) == 4, double, float>;
    typedef Sum Sums __attribute__((vector_size(VL * sizeof(Sum))));
    Sums sum = {};
    for (int64_t i = 0; i < n; i += VL) {
      const bool whole = i + VL <= n;
      const vf a = whole ? load(x + i) : load_n(x + i, n - i);
      const vf b = whole ? load(y + i) : load_n(y + i, n - i);
      sum += __builtin_convertvector(a, Sums) * __builtin_convertvector(b, Sums);
    }
    Sum total = 0;
    for (int i = 0; i < VL; ++i) total += sum[i];
    return static_cast<float>(total);
  }
  // delta = rowsum(grad_o o) - grad_lse of this thread's share of rows.
  void find_delta(const Team& team) const {
    int64_t begin, end;
    my_share(team, a.batches * a.queries, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const Document all{0, i / a.queries, 0, a.queries, 0, a.keys};
      const int64_t at = i % a.queries;
      for (int64_t h = 0; h < a.heads; ++h) {
        const Elem *x = row(a.grad_o, all, at, h), *y = row(a.o, all, at, h);
        float delta = dot(x, y, a.value_dim);
        if (a.grad_lse.data)
          delta -= static_cast<const float*>(
              a.grad_lse.data)[all.batch * a.grad_lse.batch_stride + h * a.grad_lse.head_stride +
                               at * a.grad_lse.token_stride];
        a.delta[statistics(all, h) + at] = delta;
      }
    }
  }

  // dsinks of this thread's share of heads: a sum over each document's rows, then over documents.
  void sink_gradients(const Team& team) const {
    int64_t begin, end;
    my_share(team, a.heads, 1, &begin, &end);
    for (int64_t h = begin; h < end; ++h) {
      float total = 0.f;
      for (int64_t s = 0; s < a.documents; ++s) {
        const Document d = document_at(a, s);
        const float *lse = a.lse + statistics(d, h), *delta = a.delta + statistics(d, h);
        float sum = 0.f;
        for (int64_t first = 0; first < d.queries; first += kQueries) {
          const int64_t end = smaller(d.queries, first + kQueries);
          vf part = vset(0.f);
          for (int64_t i = first; i < end; i += VL) {
            const int64_t n = smaller(VL, end - i);
            const vf row_lse = load_n(lse + i, n, -__builtin_inff());
            const vf term = vexp(vset(a.sinks[h]) - row_lse) * load_n(delta + i, n);
            part = part + (row_lse == vset(-__builtin_inff()) ? vset(0.f) : term);
          }
          sum += vsum(part);
        }
        total -= sum;
      }
      a.dsinks[h] = total;
    }
  }

  // Rows that belong to no document.
  void clear_outside() const {
    if (!a.cu_seqlens_q) return;
    const auto clear = [](void* to, int64_t row_bytes, int64_t begin, int64_t end, int64_t rows) {
      __builtin_memset(to, 0, begin * row_bytes);
      __builtin_memset(static_cast<char*>(to) + end * row_bytes, 0, (rows - end) * row_bytes);
    };
    const int64_t q_bytes = a.heads * a.dim * sizeof(Elem);
    const int64_t k_bytes = a.kv_heads * a.dim * sizeof(Elem);
    const int64_t v_bytes = a.kv_heads * a.value_dim * sizeof(Elem);
    Span q{a.queries, a.queries}, k{a.keys, a.keys};
    if (a.documents > 0) {
      const Document first = document_at(a, 0), last = document_at(a, a.documents - 1);
      q = {first.q_begin, last.q_begin + last.queries};
      k = {first.k_begin, last.k_begin + last.keys};
    }
    clear(a.dq, q_bytes, q.begin, q.end, a.queries);
    clear(a.dk, k_bytes, k.begin, k.end, a.keys);
    clear(a.dv, v_bytes, k.begin, k.end, a.keys);
  }

  // Whether a task for each KV head keeps all threads busy: by the time of the longest tasks, where
  // two passes would take 7/5 of an even share.
  bool one_pass(int threads) const {
    int64_t most = 1, total = 0;
    for (int64_t s = 0; s < a.documents; ++s) {
      const Document d = document_at(a, s);
      int64_t pairs = 1;
      for (int64_t tile = 0; tile < key_tiles(d); ++tile) {
        const Span seen_by = queries_of(a, d, {tile * kTile, smaller(d.keys, (tile + 1) * kTile)});
        pairs += larger(0, divide_up(seen_by.end, kQueries) - seen_by.begin / kQueries);
      }
      most = larger(most, pairs);
      total += pairs;
    }
    const int64_t tasks = total * a.kv_heads / most;  // as many of the longest
    return tasks == 0 || 5 * divide_up(tasks, threads) * threads <= 7 * tasks;
  }

  template <class Count, class Run>
  void each_task(const Team& team, int counter, Count count, Run run) {
    int64_t s = 0, first = 0;  // `first`: the number of document s's first task
    for (;;) {
      const int64_t index = next_task(team, counter);
      for (; s < a.documents; ++s) {
        const int64_t n = count(document_at(a, s)) * a.kv_heads;
        if (index < first + n) break;
        first += n;
      }
      if (s == a.documents) return;
      run(document_at(a, s), (index - first) % a.kv_heads, (index - first) / a.kv_heads);
    }
  }

  void run(const Team& team) {
    find_delta(team);
    if (team.thread == 0) clear_outside();
    team_sync(team);
    if (a.sinks) sink_gradients(team);
    if (one_pass(team.size)) {
      const int64_t floats = group * round_up(a.queries, kRows) * q_stride;
      allocate(1, block_tiles, true, false, smaller(floats, kThreadGradientBytes / 4));
      each_task(
          team, 0, [](const Document&) { return 1; },
          [&](const Document& d, int64_t kv_head, int64_t) { run_head(d, kv_head); });
      return;
    }
    allocate(1, block_tiles, true, false, 0);
    each_task(
        team, 0, [&](const Document& d) { return divide_up(key_tiles(d), block_tiles); },
        [&](const Document& d, int64_t kv_head, int64_t i) {
          const int64_t tile = i * block_tiles;
          run_keys(d, kv_head, tile, smaller(block_tiles, key_tiles(d) - tile), nullptr, 0);
        });
    allocate(kQueryTiles, 1, false, true, 0);
    const auto blocks = [&](const Document& d) {
      return divide_up(query_tiles(d) * group, kQueryTiles);
    };
    each_task(team, 1, blocks, [&](const Document& d, int64_t kv_head, int64_t i) {
      const int64_t first = (blocks(d) - 1 - i) * kQueryTiles;  // the longest rows first
      run_queries(d, kv_head, first, smaller(kQueryTiles, query_tiles(d) * group - first));
    });
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& a, const Team& team) {
  if (a.dtype == DType::bf16)
    Backward<GradBf16>(a).run(team);
  else if (a.dtype == DType::f16)
    Backward<GradF16>(a).run(team);
  else
    Backward<GradF32>(a).run(team);
}

}  // namespace fastllm::FASTLLM_ISA
