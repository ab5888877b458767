// Writing new keys and values into the interleaved pages, with or without the rotation of q and k
// first, as they are or as int8 codes with a scale per row. The unit of work is one (token, head). K
// is stored word by word, 64 bytes apart: 16 consecutive tokens fill the same lines, which stay in
// L1 meanwhile; the whole append is under 1% of a prefill.
#include "cpu/paging.h"
#include "cpu/rotate.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int kChunk = 16;  // tokens interleaved in K

// Slot `slot` of a (page, head): K [page/16][D/w][16][w], with w = 1 for f32 and 2 for others.
template <class E>
FASTLLM_INLINE void store_key(E* page, const E* k, int64_t slot, int64_t dim) {
  E* to = page + slot / kChunk * kChunk * dim + slot % kChunk * 2;
  for (int64_t d = 0; d < dim; d += 2) __builtin_memcpy(to + d * kChunk, k + d, 2 * sizeof(E));
}
FASTLLM_INLINE void store_key(float* page, const float* k, int64_t slot, int64_t dim) {
  float* to = page + slot / kChunk * kChunk * dim + slot % kChunk;
  for (int64_t d = 0; d < dim; ++d) to[d * kChunk] = k[d];
}
// V [page/w][D][w]. Only this slot's bytes are written: another thread may write its neighbour's.
template <class E>
FASTLLM_INLINE void store_value(E* page, const E* v, int64_t slot, int64_t dim) {
  E* to = page + slot / 2 * 2 * dim + slot % 2;
  for (int64_t d = 0; d < dim; ++d) to[2 * d] = v[d];
}
FASTLLM_INLINE void store_value(float* page, const float* v, int64_t slot, int64_t dim) {
  __builtin_memcpy(page + slot * dim, v, dim * sizeof(float));
}

typedef int8_t vcodes __attribute__((vector_size(VL)));

// x / scale rounded to nearest even, within +-127; NaN gives 0.
FASTLLM_INLINE vcodes codes_of(vf x, vf scale) {
  const vf ratio = x / scale;
  const vf clamped = vmin(vmax(ratio, vset(-127.f)), vset(127.f));
  const vf magic = vset(12582912.f);  // 1.5 * 2^23: rounds to an integer, left in the low bits
  const vi rounded = vbits(clamped + magic) - vbits(magic);
  return __builtin_convertvector(ratio == ratio ? rounded : vseti(0), vcodes);
}

// The int8 codes of a row; returns their scale, amax(|x|) / 127.
template <class T>
FASTLLM_INLINE float quantize(int8_t* codes, const T* x, int64_t dim) {
  // Magnitudes are compared as integers, which puts NaN above infinity.
  vi top = vseti(0);
  const auto see = [&](vf v) {
    const vi magnitude = vbits(v) & vseti(0x7fffffff);
    top = magnitude > top ? magnitude : top;
  };
  int64_t i = 0;
  for (; i + VL <= dim; i += VL) see(load(x + i));
  if (i < dim) see(load_n(x + i, dim - i));
  int32_t largest = 0;
  for (int lane = 0; lane < VL; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  const float scale = __builtin_bit_cast(float, largest) / 127.f;
  if (scale == 0.f) {
    for (i = 0; i < dim; ++i) codes[i] = 0;
    return scale;
  }
  const vf scales = vset(scale);
  for (i = 0; i + VL <= dim; i += VL) {
    const vcodes c = codes_of(load(x + i), scales);
    __builtin_memcpy(codes + i, &c, VL);
  }
  if (i < dim) {
    const vcodes c = codes_of(load_n(x + i, dim - i), scales);
    __builtin_memcpy(codes + i, &c, dim - i);
  }
  return scale;
}

template <class T>
FASTLLM_INLINE void append_one(const KvTarget& a, int64_t page, int64_t slot, int64_t head,
                               const T* k, const T* v) {
  const int64_t at = (page * a.kv_heads + head) * a.paging.page_size;
  if (!a.k_scales) {
    store_key(static_cast<T*>(a.k_cache) + at * a.dim, k, slot, a.dim);
    store_value(static_cast<T*>(a.v_cache) + at * a.value_dim, v, slot, a.value_dim);
    return;
  }
  alignas(64) int8_t codes[kMaxHeadDim];
  a.k_scales[at + slot] = quantize(codes, k, a.dim);
  store_key(static_cast<int8_t*>(a.k_cache) + at * a.dim, codes, slot, a.dim);
  a.v_scales[at + slot] = quantize(codes, v, a.value_dim);
  store_value(static_cast<int8_t*>(a.v_cache) + at * a.value_dim, codes, slot, a.value_dim);
}

// Calls body(token, page or -1, slot) for this thread's tokens [begin, end).
template <class Body>
FASTLLM_INLINE void for_tokens(const Paging& p, int64_t begin, int64_t end, Body body) {
  for (int64_t s = 0; s < p.sequences; ++s) {
    const Sequence seq = sequence_at(p, s);
    const int64_t low = seq.begin > begin ? seq.begin : begin, high = seq.end < end ? seq.end : end;
    for (int64_t token = low; token < high; ++token) {
      const int64_t position = seq.first + (token - seq.begin);
      body(token, seq.length ? page_at(p, s, position) : -1, position % p.page_size);
    }
  }
}

template <class T>
FASTLLM_INLINE const T* head_of(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<const T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

template <class T>
void append_heads(const AppendKvArgs& a, int64_t begin, int64_t end) {
  const int64_t heads = a.to.kv_heads;
  for_tokens(a.to.paging, begin / heads, (end + heads - 1) / heads,
             [&](int64_t token, int64_t page, int64_t slot) {
               if (page < 0) return;
               for (int64_t head = 0; head < heads; ++head) {
                 const int64_t unit = token * heads + head;
                 if (unit < begin || unit >= end) continue;
                 append_one(a.to, page, slot, head, head_of<T>(a.k, token, head),
                            head_of<T>(a.v, token, head));
               }
             });
}

template <class T>
void rotate_queries(const RopeAppendKvArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, a.to.paging.tokens * a.heads, 1, &begin, &end);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i / a.heads;
    const int64_t row = table_row(a.positions[token], a.table_rows) * a.half;
    rotate_head(static_cast<T*>(a.q_out) + i * a.to.dim, head_of<T>(a.q, token, i % a.heads),
                a.cos + row, a.sin + row, a.half, a.to.dim);
  }
}

template <class T>
void rotate_and_append(const RopeAppendKvArgs& a, int64_t begin, int64_t end) {
  const int64_t heads = a.to.kv_heads;
  alignas(64) T rotated[kMaxHeadDim];
  for_tokens(a.to.paging, begin / heads, (end + heads - 1) / heads,
             [&](int64_t token, int64_t page, int64_t slot) {
               if (page < 0) return;
               const int64_t row = table_row(a.positions[token], a.table_rows) * a.half;
               for (int64_t head = 0; head < heads; ++head) {
                 const int64_t unit = token * heads + head;
                 if (unit < begin || unit >= end) continue;
                 rotate_head(rotated, head_of<T>(a.k, token, head), a.cos + row, a.sin + row,
                             a.half, a.to.dim);
                 append_one(a.to, page, slot, head, rotated, head_of<T>(a.v, token, head));
               }
             });
}

}  // namespace

void append_kv(const AppendKvArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, a.to.paging.tokens * a.to.kv_heads, 1, &begin, &end);
  if (begin == end) return;
  dispatch_stored_float(a.to.dtype,
                        [&](auto type) { append_heads<decltype(type)>(a, begin, end); });
}

void rope_append_kv(const RopeAppendKvArgs& a, const Team& team) {
  dispatch_stored_float(a.to.dtype, [&](auto type) { rotate_queries<decltype(type)>(a, team); });
  // Keys are dealt from the other end of the team: a decode step has few heads, and the thread that
  // got one query more should get one key less.
  Team reversed = team;
  reversed.thread = team.size - 1 - team.thread;
  int64_t begin, end;
  my_share(reversed, a.to.paging.tokens * a.to.kv_heads, 1, &begin, &end);
  if (begin == end) return;
  dispatch_stored_float(a.to.dtype,
                        [&](auto type) { rotate_and_append<decltype(type)>(a, begin, end); });
}

}  // namespace fastllm::FASTLLM_ISA
