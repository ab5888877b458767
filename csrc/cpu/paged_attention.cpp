// Causal attention over the paged cache: online softmax over tiles of 64 positions, restarted every
// 512 positions (a split) and merged in ascending order.
//
// A task is a block of query rows of one KV head: row = token * group + head of the group, so that
// a decoded token reads each page once for all heads of its group. A tile of K and V stays in L1
// while the block's rows pass over it, kMaxRows at a time, their state in L2. Bound by arithmetic
// for prompts (both products at the rate of the dot instruction) and by reading the cache for
// decode.
//
// The order of operations on a row is fixed by its own positions: tiles and splits are counted from
// position 0, a tile that a row does not see is skipped or adds exact zeros, and splits computed in
// parallel go through the same merge as splits computed in one task.
#include "common/scratch.h"
#include "cpu/attention_tile.h"
#include "cpu/paging.h"
#include "ops.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int64_t kSplit = 512;
constexpr int64_t kBlockGroups = 8;  // groups of kMaxRows in a block
constexpr int64_t kBlockRows = kBlockGroups * kMaxRows;

FASTLLM_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTLLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

FASTLLM_INLINE vi lane_index() {
  vi at;
  for (int i = 0; i < VL; ++i) at[i] = i;
  return at;
}

// Rows [row, row + rows) of one sequence and KV head, at positions `first` to `last`.
struct RowSpan {
  int64_t row, rows, first, last;
};

struct Shape {
  int64_t group, steps, value_stride, value_words, limit;
  float scale;
};

// Everything a block needs while it runs, in thread scratch.
template <class E>
struct Workspace {
  typename E::A* q;  // [groups][steps][parts][kMaxRows]
  float *o, *done;   // [rows][value_stride]
  Softmax* softmax;  // [groups]
  float *m_done, *l_done;
  float (*scores)[kTile];
  typename E::A* p;
  typename E::Word* last_values;
  float* alpha;
};

FASTLLM_INLINE char* take(char*& at, int64_t bytes) {
  char* p = at;
  at += (bytes + 63) / 64 * 64;
  return p;
}

template <class E>
Workspace<E> workspace(const Shape& shape) {
  using A = typename E::A;
  const int64_t rows = kBlockRows;
  const int64_t q_bytes = rows * shape.steps * E::kParts * sizeof(A);
  const int64_t o_bytes = rows * shape.value_stride * sizeof(float);
  const int64_t fixed = kBlockGroups * sizeof(Softmax) + 2 * rows * sizeof(float) +
                        kMaxRows * kTile * (sizeof(float) + sizeof(A)) + 64 +
                        shape.value_stride * 8;
  char* at =
      static_cast<char*>(thread_scratch(Scratch::panels, q_bytes + 2 * o_bytes + fixed + 16 * 64));
  Workspace<E> w;
  w.q = reinterpret_cast<A*>(take(at, q_bytes));
  w.o = reinterpret_cast<float*>(take(at, o_bytes));
  w.done = reinterpret_cast<float*>(take(at, o_bytes));
  w.softmax = reinterpret_cast<Softmax*>(take(at, kBlockGroups * sizeof(Softmax)));
  w.m_done = reinterpret_cast<float*>(take(at, rows * sizeof(float)));
  w.l_done = reinterpret_cast<float*>(take(at, rows * sizeof(float)));
  w.scores = reinterpret_cast<float (*)[kTile]>(take(at, kMaxRows * kTile * sizeof(float)));
  w.p = reinterpret_cast<A*>(take(at, kMaxRows * kTile * sizeof(A)));
  w.alpha = reinterpret_cast<float*>(take(at, 64));
  w.last_values = reinterpret_cast<typename E::Word*>(take(at, shape.value_stride * 8));
  return w;
}

// A later split (m2, l2, o2) joins the merged earlier ones; a split without visible keys (l2 = 0)
// changes nothing and the first one with keys is taken as it is.
FASTLLM_INLINE void merge_row(float* m, float* l, float* o, float m2, float l2, const float* o2,
                              int64_t stride) {
  if (l2 == 0.f) return;
  if (*l == 0.f) {
    *m = m2;
    *l = l2;
    for (int64_t d = 0; d < stride; d += VL) vstore(o + d, vload(o2 + d));
    return;
  }
  const float top = *m > m2 ? *m : m2;
  const vf keep = vexp2<6>(vset(*m - top)), add = vexp2<6>(vset(m2 - top));
  *m = top;
  *l = sfma(l2, add[0], *l * keep[0]);
  for (int64_t d = 0; d < stride; d += VL)
    vstore(o + d, vfma(vload(o2 + d), add, vload(o + d) * keep));
}

template <class T>
FASTLLM_INLINE void store_row(T* out, const float* o, float l, int64_t dim) {
  const float inverse = l == 0.f ? 0.f : 1.f / l;
  int64_t d = 0;
  for (; d + VL <= dim; d += VL) store(out + d, vload(o + d) * inverse);
  if (d < dim) store_n(out + d, vload(o + d) * inverse, dim - d);
}

// Where the o, m and l of (split, token, head) lie; see partial_stride in api/attention.cpp.
FASTLLM_INLINE int64_t partial_stride(const PagedAttentionArgs& a) {
  return divide_up(a.value_dim, 16) * 16 + 16;
}
FASTLLM_INLINE float* partial_of(const PagedAttentionArgs& a, int64_t split, int64_t token,
                                 int64_t head) {
  return a.partials + ((split * a.paging.tokens + token) * a.heads + head) * partial_stride(a);
}

FASTLLM_INLINE void pack_query(F32, float* to, const float* x, int64_t steps) {
  for (int64_t i = 0; i < steps; ++i) to[i * kMaxRows] = x[i];
}
#if defined(__AVX512BF16__)
FASTLLM_INLINE void pack_query(Bf16, uint32_t* to, const uint16_t* x, int64_t steps) {
  for (int64_t i = 0; i < steps; ++i) __builtin_memcpy(to + i * kMaxRows, x + 2 * i, 4);
}
#else
FASTLLM_INLINE void pack_query(Bf16, float* to, const uint16_t* x, int64_t steps) {
  for (int64_t i = 0; i < 2 * steps; ++i) to[i * kMaxRows] = bf16_to_f32(x[i]);
}
#endif

// One task: the rows of a block against the tiles that they see.
template <class E>
struct Block {
  using Elem = typename E::Elem;
  using Word = typename E::Word;
  const PagedAttentionArgs& a;
  const Shape& shape;
  const Workspace<E>& w;
  int64_t s, kv_head;
  Sequence seq;
  RowSpan all;

  int64_t groups() const { return divide_up(all.rows, kMaxRows); }
  RowSpan rows_of_group(int64_t g) const {
    const int64_t row = all.row + g * kMaxRows, rows = smaller(kMaxRows, all.rows - g * kMaxRows);
    return {row, rows, seq.first + row / shape.group, seq.first + (row + rows - 1) / shape.group};
  }
  int64_t token(int64_t row) const { return seq.begin + row / shape.group; }
  int64_t head(int64_t row) const { return kv_head * shape.group + row % shape.group; }

  // Tiles [first_tile, end_tile) hold every position that some row sees.
  int64_t first_tile() const {
    return a.window_left < 0 ? 0 : larger(0, all.first - a.window_left) / kTile;
  }
  int64_t end_tile() const {
    return larger(0, divide_up(smaller(all.last + 1, shape.limit), kTile));
  }

  void pack() const {
    const int64_t group_size = shape.steps * E::kParts * kMaxRows;
    if (all.rows % kMaxRows)
      __builtin_memset(w.q + (groups() - 1) * group_size, 0, group_size * sizeof(*w.q));
    for (int64_t r = 0; r < all.rows; ++r) {
      const Elem* x = static_cast<const Elem*>(a.q.data) + token(all.row + r) * a.q.token_stride +
                      head(all.row + r) * a.q.head_stride;
      pack_query(E{}, w.q + r / kMaxRows * group_size + r % kMaxRows, x, shape.steps);
    }
  }

  void mask(const RowSpan& rows, int64_t tile) const {
    for (int64_t r = 0; r < rows.rows; ++r) {
      const int64_t position = seq.first + (rows.row + r) / shape.group - tile * kTile;
      const int end = static_cast<int>(clamp_index(position + 1, kTile));
      const int begin =
          a.window_left < 0 ? 0 : static_cast<int>(clamp_index(position - a.window_left, kTile));
      for (int c = 0; c < kTile; c += VL) {
        const vi at = lane_index() + c;
        const vf x = vload(w.scores[r] + c);
        vstore(w.scores[r] + c, (at >= begin) & (at < end) ? x : vset(-__builtin_inff()));
      }
    }
  }

  // o += P V over `positions` positions of a tile. The last word of bf16 V may pair a position with
  // one past the sequence's end, which can hold anything: that half is cleared in a copy.
  void add_values(const RowKernels<E>& kernels, float* o, const Word* v, int64_t positions,
                  bool clear_partner, const Word* next) const {
    int64_t steps = divide_up(positions, E::kPerWord);
    const Word* last = nullptr;
    if constexpr (E::kPerWord == 2) {
      if (clear_partner && positions % 2) {
        --steps;
        last = w.last_values;
        for (int64_t d = 0; d < a.value_dim; ++d)
          w.last_values[d] = v[steps * shape.value_words + d] & 0xffffu;
      }
    }
    kernels.values(o, shape.value_stride, w.alpha, w.p, v, shape.value_words, a.value_dim, steps,
                   last, reinterpret_cast<const char*>(next));
  }

  // K and V of a tile; null if the block table names no page for it.
  struct Pointers {
    const Word *k, *v;
  };
  Pointers tile_pointers(int64_t tile) const {
    const int64_t page = page_at(a.paging, s, tile * kTile);
    if (page < 0) return {nullptr, nullptr};
    const int64_t at =
        (page * a.kv_heads + kv_head) * a.paging.page_size + tile * kTile % a.paging.page_size;
    return {static_cast<const Word*>(a.k_cache) + at * a.dim / E::kPerWord,
            static_cast<const Word*>(a.v_cache) + at * a.value_dim / E::kPerWord};
  }
  void tile_step(int64_t g, int64_t tile, const Pointers& now, const Pointers& next) const {
    const RowSpan rows = rows_of_group(g);
    const int64_t first = tile * kTile, last = first + kTile - 1;
    if (rows.last < first || (a.window_left >= 0 && rows.first - a.window_left > last)) return;
    const int64_t positions = smaller(kTile, rows.last - first + 1);
    const bool all_visible =
        rows.first >= last && (a.window_left < 0 || rows.last - a.window_left <= first);
    const RowKernels<E> kernels = row_kernels<E>(rows.rows);
    kernels.scores(w.scores, w.q + g * shape.steps * E::kParts * kMaxRows, now.k, shape.steps,
                   positions, shape.scale, reinterpret_cast<const char*>(g ? now.k : next.k));
    if (!all_visible) mask(rows, tile);
    softmax_rows<E>(w.softmax[g], w.alpha, w.p, w.scores, rows.rows);
    add_values(kernels, w.o + g * kMaxRows * shape.value_stride, now.v, positions,
               first + positions >= seq.length, g ? now.v : next.v);
  }

  void run_split(int64_t split) const {
    for (int64_t g = 0; g < groups(); ++g) start(w.softmax[g]);
    for (int64_t i = 0; i < groups() * kMaxRows * shape.value_stride; i += VL)
      vstore(w.o + i, vset(0.f));
    const int64_t begin = larger(first_tile(), split * (kSplit / kTile));
    const int64_t end = smaller(end_tile(), (split + 1) * (kSplit / kTile));
    if (begin >= end) return;
    Pointers next = tile_pointers(begin);
    for (int64_t tile = begin; tile < end; ++tile) {
      const Pointers now = next;
      if (tile + 1 < end) next = tile_pointers(tile + 1);
      if (!now.k) continue;
      for (int64_t g = 0; g < groups(); ++g) tile_step(g, tile, now, next.k ? next : now);
    }
  }

  float sum(int64_t r) const { return vsum(vload(w.softmax[r / kMaxRows].l[r % kMaxRows])); }
  float top(int64_t r) const { return w.softmax[r / kMaxRows].m[r % kMaxRows]; }

  void run() const {
    pack();
    for (int64_t r = 0; r < all.rows; ++r) w.l_done[r] = 0.f;
    const int64_t begin = first_tile() * kTile / kSplit;
    const int64_t end = divide_up(end_tile() * kTile, kSplit);
    for (int64_t split = begin; split < end; ++split) {
      run_split(split);
      for (int64_t r = 0; r < all.rows; ++r)
        merge_row(w.m_done + r, w.l_done + r, w.done + r * shape.value_stride, top(r), sum(r),
                  w.o + r * shape.value_stride, shape.value_stride);
    }
    for (int64_t r = 0; r < all.rows; ++r) {
      const int64_t at = token(all.row + r) * a.heads + head(all.row + r);
      store_row(static_cast<Elem*>(a.o) + at * a.value_dim, w.done + r * shape.value_stride,
                w.l_done[r], a.value_dim);
    }
  }

  void run_partial(int64_t split) const {
    pack();
    run_split(split);
    for (int64_t r = 0; r < all.rows; ++r) {
      float* to = partial_of(a, split, token(all.row + r), head(all.row + r));
      const float* o = w.o + r * shape.value_stride;
      for (int64_t d = 0; d < shape.value_stride; d += VL) vstore(to + d, vload(o + d));
      to[partial_stride(a) - 2] = top(r);
      to[partial_stride(a) - 1] = sum(r);
    }
  }
};

// Tasks in the order in which they are handed out: the last block of every sequence (the longest
// rows), all KV heads of it, then the next to last; a split of a block is a task if splits run in
// parallel.
template <class E>
struct TaskList {
  const PagedAttentionArgs& a;
  const Shape& shape;
  const Workspace<E>& w;
  bool parallel_splits;
  int64_t s = 0, round = 0,
          first = 0;  // where the walk stands; `first` is the index of its first task
  bool found_in_round = false;

  Block<E> block() const {
    const Sequence seq = sequence_at(a.paging, s);
    const int64_t rows = seq.length ? (seq.end - seq.begin) * shape.group : 0;
    const int64_t index = divide_up(rows, kBlockRows) - 1 - round;
    RowSpan all{index * kBlockRows, 0, 0, 0};
    if (index >= 0) {
      all.rows = smaller(kBlockRows, rows - all.row);
      all.first = seq.first + all.row / shape.group;
      all.last = seq.first + (all.row + all.rows - 1) / shape.group;
    }
    return {a, shape, w, s, 0, seq, all};
  }

  // Runs task number `index`; indices of successive calls ascend. False past the end.
  bool run(int64_t index) {
    for (;; ++s) {
      if (s == a.paging.sequences) {
        if (!found_in_round) return false;
        s = 0, ++round, found_in_round = false;
      }
      Block<E> task = block();
      if (task.all.rows == 0) continue;
      found_in_round = true;
      const int64_t first_split = task.first_tile() * kTile / kSplit;
      const int64_t splits =
          parallel_splits ? divide_up(task.end_tile() * kTile, kSplit) - first_split : 1;
      const int64_t count = larger(0, splits) * a.kv_heads;
      if (index >= first + count) {
        first += count;
        continue;
      }
      task.kv_head = (index - first) % a.kv_heads;
      if (parallel_splits)
        task.run_partial(first_split + (index - first) / a.kv_heads);
      else
        task.run();
      return true;
    }
  }
};

// Rows that no task writes: dead slots, and rows past the last sequence.
FASTLLM_INLINE void clear_dead_rows(const PagedAttentionArgs& a, const Team& team) {
  const int64_t row_bytes = a.heads * a.value_dim * (a.dtype == DType::bf16 ? 2 : 4);
  char* o = static_cast<char*>(a.o);
  int64_t covered = 0;
  for (int64_t s = 0; s < a.paging.sequences; ++s) {
    const Sequence seq = sequence_at(a.paging, s);
    covered = larger(covered, seq.end);
    if (s % team.size == team.thread && seq.length == 0)
      __builtin_memset(o + seq.begin * row_bytes, 0, (seq.end - seq.begin) * row_bytes);
  }
  if (team.thread == 0)
    __builtin_memset(o + covered * row_bytes, 0, (a.paging.tokens - covered) * row_bytes);
}

template <class E>
void merge_partials(const PagedAttentionArgs& a, const Shape& shape, const Team& team) {
  using Elem = typename E::Elem;
  int64_t begin, end;
  my_share(team, a.paging.tokens * a.heads, 1, &begin, &end);
  float* o = static_cast<float*>(thread_scratch(Scratch::rows, shape.value_stride * sizeof(float)));
  for (int64_t s = 0; s < a.paging.sequences; ++s) {
    const Sequence seq = sequence_at(a.paging, s);
    if (seq.length == 0) continue;
    const int64_t high = smaller(end, seq.end * a.heads);
    for (int64_t i = larger(begin, seq.begin * a.heads); i < high; ++i) {
      const int64_t token = i / a.heads, position = seq.first + token - seq.begin;
      const int64_t last = smaller(position + 1, shape.limit);
      int64_t split = a.window_left < 0 ? 0 : larger(0, position - a.window_left) / kSplit;
      float m = 0.f, l = 0.f;
      for (; split * kSplit < last; ++split) {
        const float* part = partial_of(a, split, token, i % a.heads);
        merge_row(&m, &l, o, part[partial_stride(a) - 2], part[partial_stride(a) - 1], part,
                  shape.value_stride);
      }
      store_row(static_cast<Elem*>(a.o) + i * a.value_dim, o, l, a.value_dim);
    }
  }
}

template <class E>
void attend(const PagedAttentionArgs& a, const Team& team) {
  const Shape shape{.group = a.heads / a.kv_heads,
                    .steps = a.dim / E::kPerWord,
                    .value_stride = divide_up(a.value_dim, VL) * VL,
                    .value_words = a.value_dim,
                    .limit = a.paging.table_width * a.paging.page_size,
                    .scale = a.scale * 1.44269504088896341f};
  int64_t longest = 0;
  for (int64_t s = 0; s < a.paging.sequences; ++s)
    longest = larger(longest, a.paging.cache_seqlens[s]);
  const bool parallel_splits = a.partials && smaller(longest, shape.limit) > kSplit;
  clear_dead_rows(a, team);
  const Workspace<E> w = workspace<E>(shape);
  TaskList<E> tasks{a, shape, w, parallel_splits};
  while (tasks.run(next_task(team))) {
  }
  if (parallel_splits) {
    team_sync(team);
    merge_partials<E>(a, shape, team);
  }
}

}  // namespace

void paged_attention(const PagedAttentionArgs& a, const Team& team) {
  if (a.dtype == DType::bf16)
    attend<Bf16>(a, team);
  else
    attend<F32>(a, team);
}

}  // namespace fastllm::FASTLLM_ISA
