// Rows of attention: which keys they see, their state while a block of them runs, how the splits of
// a row are merged and finished. See attention_block.h.
#pragma once
#include "common/scratch.h"
#include "cpu/attention_variants.h"
#include "cpu/attention_words.h"
#include "cpu/integers.h"
#include "cpu/lse.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int64_t kSplit = 512;
constexpr int64_t kBlockGroups = 8;  // groups of kMaxRows in a block
// A document with up to so many groups is one block: its tiles are then made only once.
constexpr int64_t kOneBlockGroups = 12;

// The queries of one document: rows [begin, begin + count) of o.
struct Document {
  int64_t begin, count;
  int64_t first;                    // position of the first query; may be negative
  int64_t keys;                     // positions [0, keys) exist
  int64_t q_at;                     // where row `begin` lies in q, in elements
  int64_t lse_at, lse_head_stride;  // where its lse lies for head 0, and from head to head
};

// Rows [row, row + rows) of one document and KV head, at positions `first` to `last`.
struct RowSpan {
  int64_t row, rows, first, last;
};

// The words of K and V of one tile.
template <class E>
struct Tile {
  const typename E::Word *k, *v;
  uint64_t visible;  // bit p: position p may be seen
  // Memory that the pass over K and the pass over V ask for meanwhile, or null.
  const char *ahead_of_k = nullptr, *ahead_of_v = nullptr;
  const float *k_scale = nullptr, *v_scale = nullptr;  // of its 64 positions, or null
  // Of a tile of codes that is multiplied as it lies; k and v are not made then.
  const CodePair *k_codes = nullptr, *v_codes = nullptr;
  int64_t v_stride = 0;  // words from one step of V to the next, if not value_dim
};

struct Shape {
  int64_t group, steps, value_stride;
  float scale;       // > 0: what makes base-2 logits of scores
  float natural;     // what makes logits of them
  bool negate;       // the caller's scale is negative: q is negated instead
  float cap_scale;   // with a softcap: what makes the argument of tanh, and scale is that of tanh
  int64_t max_rows;  // of a block
};

template <class E>
FASTLLM_INLINE Shape shape_of(const AttentionRows& a) {
  constexpr float kLog2e = 1.44269504088896341f;
  const bool capped = a.softcap > 0;
  const float magnitude = __builtin_fabsf(a.scale);
  return {.group = a.heads / a.kv_heads,
          .steps = a.dim / E::kPerWord,
          .value_stride = divide_up(a.value_dim, VL) * VL,
          .scale = capped             ? a.softcap * kLog2e
                   : magnitude == 0.f ? 1e-30f
                                      : magnitude * kLog2e,
          .natural = capped             ? a.softcap
                     : magnitude == 0.f ? 1e-30f
                                        : magnitude,
          .negate = !capped && a.scale < 0,
          .cap_scale = capped ? a.scale / a.softcap : 0.f,
          .max_rows = kOneBlockGroups * kMaxRows};
}

// Keys that a query at position p sees: [first_key, end_key), apart from a mask of single keys.
FASTLLM_INLINE int64_t first_key(const AttentionRows& a, int64_t p) {
  return a.window_left < 0 ? 0 : larger(0, p - a.window_left);
}
FASTLLM_INLINE int64_t end_key(const AttentionRows& a, int64_t keys, int64_t p) {
  return a.window_right < 0 ? keys : clamped(p + a.window_right + 1, 0, keys);
}

// Everything a block needs while it runs, in thread scratch.
template <class E>
struct Workspace {
  typename E::A* q;  // [groups][steps][parts][kMaxRows]
  float *o, *done;   // [rows][value_stride]
  Softmax* softmax;  // [groups]
  float *m_done, *l_done;
  float (*scores)[kTile];
  typename E::A* p;
  typename E::Word* edge_values[2];  // words of V of which one half is hidden
  float* alpha;
  TileScratch<E> tile;
};

FASTLLM_INLINE char* take(char*& at, int64_t bytes) {
  char* p = at;
  at += (bytes + 63) / 64 * 64;
  return p;
}

template <class E>
Workspace<E> workspace(const Shape& shape, const AttentionRows& a, bool local_tiles) {
  using A = typename E::A;
  using Word = typename E::Word;
  const int64_t rows = shape.max_rows, groups = rows / kMaxRows;
  const int64_t q_bytes = rows * shape.steps * E::kParts * sizeof(A);
  const int64_t o_bytes = rows * shape.value_stride * sizeof(float);
  const int64_t k_bytes = local_tiles ? kTile * shape.steps * sizeof(Word) : 0;
  const int64_t v_bytes = local_tiles ? kTile / E::kPerWord * a.value_dim * sizeof(Word) : 0;
  const int64_t fixed = groups * sizeof(Softmax) + 2 * rows * sizeof(float) +
                        kMaxRows * kTile * (sizeof(float) + sizeof(A)) + 64 +
                        2 * a.value_dim * sizeof(Word) + 2 * kTile * sizeof(float);
  char* at = static_cast<char*>(
      thread_scratch(Scratch::panels, q_bytes + 2 * o_bytes + k_bytes + v_bytes + fixed + 24 * 64));
  Workspace<E> w;
  w.q = reinterpret_cast<A*>(take(at, q_bytes));
  w.o = reinterpret_cast<float*>(take(at, o_bytes));
  w.done = reinterpret_cast<float*>(take(at, o_bytes));
  w.softmax = reinterpret_cast<Softmax*>(take(at, groups * sizeof(Softmax)));
  w.m_done = reinterpret_cast<float*>(take(at, rows * sizeof(float)));
  w.l_done = reinterpret_cast<float*>(take(at, rows * sizeof(float)));
  w.scores = reinterpret_cast<float (*)[kTile]>(take(at, kMaxRows * kTile * sizeof(float)));
  w.p = reinterpret_cast<A*>(take(at, kMaxRows * kTile * sizeof(A)));
  w.alpha = reinterpret_cast<float*>(take(at, 64));
  for (auto& edge : w.edge_values)
    edge = reinterpret_cast<Word*>(take(at, a.value_dim * sizeof(Word)));
  w.tile.k = reinterpret_cast<Word*>(take(at, k_bytes));
  w.tile.v = reinterpret_cast<Word*>(take(at, v_bytes));
  for (auto& scale : w.tile.scale)
    scale = reinterpret_cast<float*>(take(at, kTile * sizeof(float)));
  return w;
}

// A later split (m2, l2, o2) joins the merged earlier ones; a split without visible keys (l2 = 0)
// changes nothing and the first one with keys is taken as it is. Maxima are of scores.
FASTLLM_INLINE void merge_row(const Shape& shape, float* m, float* l, float* o, float m2, float l2,
                              const float* o2) {
  const int64_t stride = shape.value_stride;
  if (l2 == 0.f) return;
  if (*l == 0.f) {
    *m = m2;
    *l = l2;
    for (int64_t d = 0; d < stride; d += VL) vstore(o + d, vload(o2 + d));
    return;
  }
  const float top = *m > m2 ? *m : m2;
  const vf keep = vexp2<6>(vset((*m - top) * shape.scale));
  const vf add = vexp2<6>(vset((m2 - top) * shape.scale));
  *m = top;
  *l = sfma(l2, add[0], *l * keep[0]);
  for (int64_t d = 0; d < stride; d += VL)
    vstore(o + d, vfma(vload(o2 + d), add, vload(o + d) * keep));
}

// The end of a row: the sink joins, o is divided and rounded, the log-sum-exp is stored. `m` is the
// largest score; the log-sum-exp is made of it with one rounding, for the backward takes P from it.
// `token` counts from the document's first query.
template <class T>
FASTLLM_INLINE void finish_row(const AttentionRows& a, const Shape& shape, const Document& doc,
                               int64_t token, int64_t head, const float* o, float m, float l) {
  constexpr float kLog2e = 1.44269504088896341f;
  float factor = l == 0.f ? 0.f : 1.f / l, lse = -__builtin_inff();
  if (a.lse && l != 0.f) lse = sfma(m, shape.natural, log1(l));
  if (a.sinks) {
    const float sink = a.sinks[head];
    if (l == 0.f) {
      lse = sink;
    } else {  // the largest logit is never rounded on its own: neither here nor in lse
      const float above = sfma(m, shape.natural, -sink);
      const float keep = vexp2<6>(vset(above < 0.f ? above * kLog2e : 0.f))[0];
      const float total = sfma(l, keep, vexp2<6>(vset(above < 0.f ? 0.f : -above * kLog2e))[0]);
      factor = keep / total;
      lse = above < 0.f ? sink + log1(total) : sfma(m, shape.natural, log1(total));
    }
  }
  if (a.lse) a.lse[doc.lse_at + head * doc.lse_head_stride + token] = lse;
  T* out = static_cast<T*>(a.o) + ((doc.begin + token) * a.heads + head) * a.value_dim;
  int64_t d = 0;
  for (; d + VL <= a.value_dim; d += VL) store(out + d, vload(o + d) * factor);
  if (d < a.value_dim) store_n(out + d, vload(o + d) * factor, a.value_dim - d);
}

// Where the o, m and l of (split, token of o, head) lie; see AttentionRows in ops_core.h.
FASTLLM_INLINE int64_t partial_stride(const AttentionRows& a) {
  return divide_up(a.value_dim, 16) * 16 + 16;
}
FASTLLM_INLINE float* partial_of(const AttentionRows& a, int64_t split, int64_t token,
                                 int64_t head) {
  return a.partials + ((split * a.tokens + token) * a.heads + head) * partial_stride(a);
}

template <class E>
FASTLLM_INLINE void pack_query(E, typename E::A* to, const typename E::Elem* x, int64_t dim,
                               bool negate) {
  const float sign = negate ? -1.f : 1.f;
  for (int64_t i = 0; i < dim; ++i) to[i * kMaxRows] = sign * load1(x + i);
}
#if defined(__AVX512BF16__)
FASTLLM_INLINE void pack_query(Bf16, uint32_t* to, const uint16_t* x, int64_t dim, bool negate) {
  const uint32_t signs = negate ? 0x80008000u : 0u;
  for (int64_t i = 0; i < dim; i += 2) {
    uint32_t pair;
    __builtin_memcpy(&pair, x + i, 4);
    to[i / 2 * kMaxRows] = pair ^ signs;
  }
}
#endif

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
