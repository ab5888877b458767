// Attention of a block of query rows over the KV tiles of a document: an online softmax over tiles
// of 64 positions, restarted every 512 positions (a split) and merged in ascending order. Where the
// tiles come from is the business of a source; a task list shares the blocks out among threads.
//
// A task is a block of query rows of one KV head: row = token * group + head of the group, so that
// a token reads each tile once for all heads of its group. A tile of K and V stays in L1 while the
// block's rows pass over it, kMaxRows at a time, their state in L2. A block of few rows takes
// several KV heads, tile by tile: their tiles are neighbours in a page, and memory is read in runs
// of that many tiles (2 cores read 42 GB/s in order, 28 in runs of 16 KB, 38 in runs of 128 KB).
//
// The order of operations on a row is fixed by its own document: tiles and splits are counted from
// key position 0, a tile that a row does not see is skipped or adds exact zeros, and splits
// computed in parallel go through the same merge as splits computed in one task.
//
// A source (of element type E) has
//   int64_t documents();  Document document(int64_t s);
//   Place place(document, s, kv_head, tile): where a tile lies; `given` is false if it has no keys
//   Tile<E> words(tile scratch, place, next, once): the tile, what to prefetch meanwhile, and
//     whether no more than kMaxRows rows read it
#pragma once
#include "cpu/attention_rows.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// One task: the rows of a block, of a few KV heads, against the tiles that they see.
template <class E, class Source>
struct Block {
  using Elem = typename E::Elem;
  using Word = typename E::Word;
  using Place = typename Source::Place;
  const AttentionRows& a;
  const Source& source;
  const Shape& shape;
  const Workspace<E>& w;
  int64_t s, kv_head, heads;  // KV heads [kv_head, kv_head + heads)
  Document doc;
  RowSpan all;  // of each

  // Group g of KV head kv_head + h keeps its state at unit h * groups() + g, its row r at
  // h * padded_rows() + r.
  int64_t groups() const { return divide_up(all.rows, kMaxRows); }
  int64_t padded_rows() const { return groups() * kMaxRows; }
  RowSpan rows_of_group(int64_t g) const {
    const int64_t row = all.row + g * kMaxRows, rows = smaller(kMaxRows, all.rows - g * kMaxRows);
    return {row, rows, doc.first + row / shape.group, doc.first + (row + rows - 1) / shape.group};
  }
  int64_t token(int64_t row) const { return row / shape.group; }
  int64_t head(int64_t h, int64_t row) const {
    return (kv_head + h) * shape.group + row % shape.group;
  }

  // Tiles [first_tile, end_tile) hold every position that some row sees.
  int64_t first_tile() const { return first_key(a, all.first) / kTile; }
  int64_t end_tile() const { return divide_up(end_key(a, doc.keys, all.last), kTile); }

  void pack() const {
    const int64_t group_size = shape.steps * E::kParts * kMaxRows;
    for (int64_t h = 0; h < heads; ++h) {
      auto* q = w.q + h * groups() * group_size;
      if (all.rows % kMaxRows)
        __builtin_memset(q + (groups() - 1) * group_size, 0, group_size * sizeof(*q));
      for (int64_t r = 0; r < all.rows; ++r) {
        const Elem* x = static_cast<const Elem*>(a.q.data) + doc.q_at +
                        token(all.row + r) * a.q.token_stride +
                        head(h, all.row + r) * a.q.head_stride;
        pack_query(E{}, q + r / kMaxRows * group_size + r % kMaxRows, x, a.dim, shape.negate);
      }
    }
  }

  void mask(const RowSpan& rows, int64_t tile, uint64_t visible) const {
    for (int64_t r = 0; r < rows.rows; ++r) {
      const int64_t position = doc.first + (rows.row + r) / shape.group;
      mask_row(w.scores[r], first_key(a, position) - tile * kTile,
               end_key(a, doc.keys, position) - tile * kTile, visible);
    }
  }

  // Q K^T over the first `end` positions of a tile; asks for `ahead` meanwhile.
  void multiply_keys(const typename E::A* q, const Tile<E>& tile, const char* ahead, int64_t rows,
                     int64_t end) const {
    if constexpr (E::kReadsCodes)
      if (tile.k_codes)
        return code_kernels(rows).scores(w.scores, q, tile.k_codes, shape.steps, end, ahead);
    row_kernels(E{}, rows).scores(w.scores, q, tile.k, shape.steps, end, ahead);
  }

  // o += P V over positions [begin, end) of a tile; asks for `ahead` meanwhile. A word of bf16 pairs
  // two positions: where one of them is hidden from all rows it may hold anything and is cleared in
  // a copy.
  void add_values(float* o, const Tile<E>& tile, const char* ahead, int64_t rows, int64_t begin,
                  int64_t end) const {
    constexpr int64_t kPair = E::kPerWord;
    const int64_t dim = a.value_dim;
    int64_t from = begin / kPair, to = divide_up(end, kPair);
    if constexpr (E::kReadsCodes)
      if (tile.v_codes) {  // whatever code a hidden position has, it times 0 is 0
        const Run<CodePair> run{tile.v_codes + from * dim, to - from};
        return code_kernels(rows).values(o, shape.value_stride, w.alpha, w.p + from, &run, 1, dim,
                                         dim, ahead);
      }
    const typename E::A* p = w.p + from * E::kParts;
    Run<Word> runs[3];
    int count = 0;
    if constexpr (kPair == 2) {
      if (begin % 2) {
        for (int64_t d = 0; d < dim; ++d)
          w.edge_values[0][d] = tile.v[from * dim + d] & 0xffff0000u;
        runs[count++] = {w.edge_values[0], 1};
        ++from;
      }
      if (end % 2) {
        --to;
        for (int64_t d = 0; d < dim; ++d) w.edge_values[1][d] = tile.v[to * dim + d] & 0xffffu;
      }
    }
    const int64_t stride = tile.v_stride ? tile.v_stride : dim;
    if (from < to) runs[count++] = {tile.v + from * stride, to - from};
    if (kPair == 2 && end % 2) runs[count++] = {w.edge_values[1], 1};
    row_kernels(E{}, rows).values(o, shape.value_stride, w.alpha, p, runs, count, stride, dim,
                                  ahead);
  }

  void tile_step(int64_t h, int64_t g, int64_t index, const Tile<E>& tile) const {
    const int64_t unit = h * groups() + g;
    const RowSpan rows = rows_of_group(g);
    const int64_t first = index * kTile;
    const int64_t begin = larger(0, first_key(a, rows.first) - first);
    const int64_t end = smaller(kTile, end_key(a, doc.keys, rows.last) - first);
    if (begin >= end) return;
    const bool all_visible = tile.visible == ~uint64_t{0} && first_key(a, rows.last) <= first &&
                             end_key(a, doc.keys, rows.first) >= first + kTile;
    multiply_keys(w.q + unit * shape.steps * E::kParts * kMaxRows, tile,
                  g == 0 ? tile.ahead_of_k : nullptr, rows.rows, end);
    if (tile.k_scale) scale_columns(w.scores, rows.rows, tile.k_scale);
    if (a.softcap > 0) cap_scores(w.scores, rows.rows, shape.cap_scale);
    if (!all_visible) mask(rows, index, tile.visible);
    if (tile.v_scale)
      softmax_rows<E, true>(w.softmax[unit], w.alpha, w.p, w.scores, rows.rows, shape.scale,
                            tile.v_scale);
    else
      softmax_rows<E, false>(w.softmax[unit], w.alpha, w.p, w.scores, rows.rows, shape.scale,
                             nullptr);
    add_values(w.o + unit * kMaxRows * shape.value_stride, tile,
               g + 1 == groups() ? tile.ahead_of_v : nullptr, rows.rows, begin, end);
  }

  // `follow` is the tile that this thread comes to after the split, as far as it is known: a first
  // tile that nothing has asked for takes several times as long as the others.
  void run_split(int64_t split, const Place& follow) const {
    for (int64_t unit = 0; unit < heads * groups(); ++unit) start(w.softmax[unit]);
    for (int64_t i = 0; i < heads * padded_rows() * shape.value_stride; i += VL)
      vstore(w.o + i, vset(0.f));
    const int64_t begin = larger(first_tile(), split * (kSplit / kTile));
    const int64_t end = smaller(end_tile(), (split + 1) * (kSplit / kTile));
    if (begin >= end) return;
    Place next = source.place(doc, s, kv_head, begin);
    for (int64_t index = begin; index < end; ++index)
      for (int64_t h = 0; h < heads; ++h) {
        const Place now = next;
        next = h + 1 < heads     ? source.place(doc, s, kv_head + h + 1, index)
               : index + 1 < end ? source.place(doc, s, kv_head, index + 1)
                                 : follow;
        if (!now.given) continue;
        const Tile<E> tile = source.words(w.tile, now, next.given ? next : now, groups() == 1);
        for (int64_t g = 0; g < groups(); ++g) tile_step(h, g, index, tile);
      }
  }

  float sum(int64_t at) const { return vsum(vload(w.softmax[at / kMaxRows].l[at % kMaxRows])); }
  float top(int64_t at) const { return w.softmax[at / kMaxRows].m[at % kMaxRows]; }

  // f(where a row's state lies, its token, its head) for all rows.
  template <class F>
  void each_row(F f) const {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < all.rows; ++r)
        f(h * padded_rows() + r, token(all.row + r), head(h, all.row + r));
  }

  void run(const Place& follow) const {
    pack();
    each_row([&](int64_t at, int64_t, int64_t) { w.l_done[at] = 0.f; });
    const int64_t begin = first_tile() * kTile / kSplit;
    const int64_t end = divide_up(end_tile() * kTile, kSplit);
    for (int64_t split = begin; split < end; ++split) {
      const int64_t next = (split + 1) * (kSplit / kTile);
      run_split(split, next < end_tile() ? source.place(doc, s, kv_head, next) : follow);
      each_row([&](int64_t at, int64_t, int64_t) {
        merge_row(shape, w.m_done + at, w.l_done + at, w.done + at * shape.value_stride, top(at),
                  sum(at), w.o + at * shape.value_stride);
      });
    }
    each_row([&](int64_t at, int64_t token, int64_t head) {
      float* o = w.done + at * shape.value_stride;
      if (w.l_done[at] == 0.f) __builtin_memset(o, 0, shape.value_stride * sizeof(float));
      finish_row<Elem>(a, shape, doc, token, head, o, w.m_done[at], w.l_done[at]);
    });
  }

  // The rows of q may be those that are packed from the task before.
  void run_partial(int64_t split, const Place& follow, bool packed) const {
    if (!packed) pack();
    run_split(split, follow);
    each_row([&](int64_t at, int64_t token, int64_t head) {
      float* to = partial_of(a, split, doc.begin + token, head);
      const float* o = w.o + at * shape.value_stride;
      for (int64_t d = 0; d < shape.value_stride; d += VL) vstore(to + d, vload(o + d));
      to[partial_stride(a) - 2] = top(at);
      to[partial_stride(a) - 1] = sum(at);
    });
  }
};

// Which rows of q a block packs: its document, first KV head and first row.
struct QueryRows {
  int64_t s, kv_head, row;
  bool operator==(const QueryRows&) const = default;
};

// Rows of a document and KV head that make one block.
FASTLLM_INLINE int64_t block_rows(int64_t rows) {
  return rows <= kOneBlockGroups * kMaxRows ? larger(1, rows) : kBlockGroups * kMaxRows;
}

// Tasks in the order in which they are handed out: the last block of every document (the longest
// rows), all KV heads of it, then the next to last; a split of a block is a task if splits run in
// parallel. A task has up to `heads_together` KV heads, as many as have room for their state.
template <class E, class Source>
struct TaskList {
  const AttentionRows& a;
  const Source& source;
  const Shape& shape;
  const Workspace<E>& w;
  bool parallel_splits;
  int64_t heads_together;
  // Where the walk stands; `first` is the index of its first task.
  int64_t s = 0, round = 0, first = 0;
  bool found_in_round = false;
  QueryRows packed = {-1, 0, 0};  // whose q the workspace holds

  Block<E, Source> block() const {
    if (s == source.documents()) return {a, source, shape, w, s, 0, 0, {}, {}};
    const Document doc = source.document(s);
    const int64_t rows = doc.count * shape.group, in_block = block_rows(rows);
    const int64_t index = divide_up(rows, in_block) - 1 - round;
    RowSpan all{index * in_block, 0, 0, 0};
    if (index >= 0) {
      all.rows = smaller(in_block, rows - all.row);
      all.first = doc.first + all.row / shape.group;
      all.last = doc.first + (all.row + all.rows - 1) / shape.group;
    }
    return {a, source, shape, w, s, 0, 0, doc, all};
  }

  struct Task {
    Block<E, Source> block;  // of no rows past the end of the list
    int64_t split;           // which of its splits, if splits run in parallel
    int64_t first_tile() const { return larger(block.first_tile(), split * (kSplit / kTile)); }
  };

  // Task number `index`; indices of successive calls ascend.
  Task find(int64_t index) {
    for (;; ++s) {
      if (s == source.documents()) {
        if (!found_in_round) return {block(), 0};
        s = 0, ++round, found_in_round = false;
      }
      Block<E, Source> found = block();
      if (found.all.rows == 0) continue;
      found_in_round = true;
      const int64_t first_split = found.first_tile() * kTile / kSplit;
      const int64_t splits =
          parallel_splits ? divide_up(found.end_tile() * kTile, kSplit) - first_split : 1;
      const int64_t room = kOneBlockGroups / found.groups();
      const int64_t together = smaller(room, heads_together);
      const int64_t shares = divide_up(a.kv_heads, together);
      const int64_t count = larger(0, splits) * shares;
      if (index >= first + count) {
        first += count;
        continue;
      }
      found.kv_head = (index - first) % shares * together;
      found.heads = smaller(together, a.kv_heads - found.kv_head);
      return {found, parallel_splits ? first_split + (index - first) / shares : 0};
    }
  }

  // Runs task number `index`; this thread's next one is likely to be number `next_index`. False past
  // the end.
  bool run(int64_t index, int64_t next_index) {
    const Task task = find(index);
    if (task.block.all.rows == 0) return false;
    typename Source::Place follow{};
    TaskList list = *this;
    const Task next = list.find(next_index);
    if (next.block.all.rows)
      follow = source.place(next.block.doc, next.block.s, next.block.kv_head, next.first_tile());
    if (parallel_splits) {
      const QueryRows rows = {task.block.s, task.block.kv_head, task.block.all.row};
      task.block.run_partial(task.split, follow, rows == packed);
      packed = rows;
    } else {
      task.block.run(follow);
    }
    return true;
  }
};

// Rows [begin, end) of o that belong to no document.
FASTLLM_INLINE void clear_rows(const AttentionRows& a, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t row_bytes = a.heads * a.value_dim * (a.dtype == DType::f32 ? 4 : 2);
  __builtin_memset(static_cast<char*>(a.o) + begin * row_bytes, 0, (end - begin) * row_bytes);
}

template <class E, class Source>
void merge_partials(const AttentionRows& a, const Source& source, const Shape& shape,
                    const Team& team) {
  int64_t begin, end;
  my_share(team, a.tokens * a.heads, 1, &begin, &end);
  float* o = static_cast<float*>(thread_scratch(Scratch::rows, shape.value_stride * sizeof(float)));
  for (int64_t s = 0; s < source.documents(); ++s) {
    const Document doc = source.document(s);
    const int64_t high = smaller(end, (doc.begin + doc.count) * a.heads);
    for (int64_t i = larger(begin, doc.begin * a.heads); i < high; ++i) {
      const int64_t token = i / a.heads - doc.begin, position = doc.first + token;
      const int64_t last = end_key(a, doc.keys, position);
      int64_t split = first_key(a, position) / kSplit;
      float m = 0.f, l = 0.f;
      __builtin_memset(o, 0, shape.value_stride * sizeof(float));
      for (; split * kSplit < last; ++split) {
        const float* part = partial_of(a, split, doc.begin + token, i % a.heads);
        merge_row(shape, &m, &l, o, part[partial_stride(a) - 2], part[partial_stride(a) - 1], part);
      }
      finish_row<typename E::Elem>(a, shape, doc, token, i % a.heads, o, m, l);
    }
  }
}

// How many KV heads a task may have. Only where a tile serves few rows, and reading it is what takes
// time; and only so many that there are tasks enough for every thread to be busy to the end.
template <class Source>
FASTLLM_INLINE int64_t heads_of_task(const AttentionRows& a, const Source& source,
                                     bool parallel_splits, const Team& team) {
  constexpr int64_t kTasksPerThread = 8;
  const int64_t documents = source.documents();
  if (a.tokens > 4 * documents) return 1;
  if (team.size == 1) return a.kv_heads;
  int64_t tasks = 0;
  for (int64_t s = 0; s < documents; ++s)
    tasks += a.kv_heads * (parallel_splits ? divide_up(source.document(s).keys, kSplit) : 1);
  return clamped(tasks / (kTasksPerThread * team.size), 1, a.kv_heads);
}

// All documents of a source. `parallel_splits` may be true only if a.partials is given; all threads
// pass the same.
template <class E, class Source>
void attend(const AttentionRows& a, const Source& source, bool parallel_splits, bool local_tiles,
            const Team& team) {
  const Shape shape = shape_of<E>(a);
  const Workspace<E> w = workspace<E>(shape, a, local_tiles);
  const int64_t together = heads_of_task(a, source, parallel_splits, team);
  TaskList<E, Source> tasks{a, source, shape, w, parallel_splits, together};
  // Tasks are handed out in turn as long as they take equally long.
  int64_t index = next_task(team);
  while (tasks.run(index, index + team.size)) index = next_task(team);
  if (parallel_splits) {
    team_sync(team);
    merge_partials<E>(a, source, shape, team);
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
