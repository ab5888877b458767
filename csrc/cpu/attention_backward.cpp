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

#include "cpu/attention_backward_pair.h"
#include "cpu/lse.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class E>
struct Backward : BackwardTiles<E> {
  using Tiles = BackwardTiles<E>;
  using Tiles::a, Tiles::group, Tiles::q_stride, Tiles::v_stride;
  using Tiles::allocate, Tiles::row, Tiles::statistics, Tiles::load_query, Tiles::prefetch_query;
  using Tiles::block_tiles, Tiles::query, Tiles::key, Tiles::dq, Tiles::dq_rows;
  using Tiles::load_key, Tiles::pair, Tiles::store_keys, Tiles::store_queries;
  using Tiles::Tiles;
  using typename Tiles::Elem;

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
