// Attention over keys and values in natural order, batches or packed documents (attention_block.h).
// A tile is packed into words when a block comes to it; where several blocks of a KV head would do
// so, all threads pack K and V once into scratch first. The words, and so the bits, are the same.
#include "cpu/attention_block.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Bit p: mask[p] is set, for the first n of 64 keys.
FASTLLM_INLINE uint64_t mask_bits(const uint8_t* mask, int64_t n) {
  uint64_t bits = 0;
  if (n == kTile) {
    for (int i = 0; i < kTile; i += 16) {
      const __m128i zero = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i*)(mask + i)), __m128i{});
      bits |= static_cast<uint64_t>(~_mm_movemask_epi8(zero) & 0xffff) << i;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) bits |= static_cast<uint64_t>(mask[i] != 0) << i;
  }
  return bits;
}

template <class E>
struct NaturalSource {
  using Elem = typename E::Elem;
  using Word = typename E::Word;
  const AttentionArgs& a;

  struct Place {
    bool given;
    NaturalRows<Elem> rows;
    uint64_t visible;
    int64_t keys;  // of the tile
    Word* packed;  // the tile in scratch, or null
  };

  int64_t documents() const { return a.documents; }

  struct Range {
    int64_t begin, count;
  };
  static Range range(const int32_t* starts, int64_t s, int64_t size) {
    const int64_t begin = clamped(starts[s], 0, size);
    return {begin, clamped(starts[s + 1], begin, size) - begin};
  }
  Range keys_of(int64_t s) const {
    return a.cu_seqlens_k ? range(a.cu_seqlens_k, s, a.keys) : Range{0, a.keys};
  }
  Document document(int64_t s) const {
    const int64_t keys = keys_of(s).count;
    if (a.cu_seqlens_q) {
      const Range rows = range(a.cu_seqlens_q, s, a.queries);
      return {rows.begin, rows.count, keys - rows.count, keys, rows.begin * a.rows.q.token_stride,
              rows.begin, a.queries};
    }
    return {s * a.queries,
            a.queries,
            keys - a.queries,
            keys,
            s * a.q_batch_stride,
            s * a.rows.heads * a.queries,
            a.queries};
  }

  // Tiles in scratch: [kv_heads][tiles of all documents].
  int64_t tile_words() const { return kTile * (a.rows.dim + a.rows.value_dim) / E::kPerWord; }
  int64_t all_tiles() const {
    return a.cu_seqlens_k ? a.keys / kTile + a.documents : divide_up(a.keys, kTile) * a.documents;
  }
  Word* packed_tile(int64_t s, int64_t kv_head, int64_t tile) const {
    const int64_t before =
        a.cu_seqlens_k ? keys_of(s).begin / kTile + s : divide_up(a.keys, kTile) * s;
    return static_cast<Word*>(a.packed) + (kv_head * all_tiles() + before + tile) * tile_words();
  }
  bool packs_first(const Document& doc) const {
    const int64_t rows = doc.count * (a.rows.heads / a.rows.kv_heads);
    return a.packed && rows > block_rows(rows);
  }

  Place place(const Document& doc, int64_t s, int64_t kv_head, int64_t tile) const {
    const int64_t n = smaller(kTile, doc.keys - tile * kTile);
    if (n <= 0) return {};
    const int64_t batch = a.cu_seqlens_k ? 0 : s;
    const int64_t key = (a.cu_seqlens_k ? keys_of(s).begin : 0) + tile * kTile;
    uint64_t visible = first_bits(n);
    if (a.key_mask) visible &= mask_bits(a.key_mask + batch * a.mask_batch_stride + key, n);
    if (!visible) return {};
    return {true,
            {static_cast<const Elem*>(a.k.data) + batch * a.k_batch_stride +
                 key * a.k.token_stride + kv_head * a.k.head_stride,
             static_cast<const Elem*>(a.v.data) + batch * a.v_batch_stride +
                 key * a.v.token_stride + kv_head * a.v.head_stride,
             a.k.token_stride, a.v.token_stride},
            visible,
            n,
            packs_first(doc) ? packed_tile(s, kv_head, tile) : nullptr};
  }

  void pack(const Place& place, const Place& next, Word* k, Word* v) const {
    pack_tile<E>(k, v, place.rows, next.rows, place.visible, place.keys, a.rows.dim,
                 a.rows.value_dim);
  }
  int64_t key_words() const { return kTile * a.rows.dim / E::kPerWord; }

  Tile<E> words(const TileScratch<E>& scratch, const Place& now, const Place& next,
                bool once) const {
    // Rows of f32 are words of V as they lie, unless one of them must not be read. Many rows want
    // them side by side.
    if constexpr (__is_same(E, F32))
      if (once && !now.packed && now.visible == first_bits(now.keys)) {
        pack(now, next, scratch.k, nullptr);
        return {
            .k = scratch.k, .v = now.rows.v, .visible = now.visible, .v_stride = now.rows.v_stride};
      }
    if (!now.packed) {
      pack(now, next, scratch.k, scratch.v);
      return {scratch.k, scratch.v, now.visible};
    }
    Word *k = now.packed, *v = k + key_words();
    if (!next.packed) return {k, v, now.visible};
    return {k, v, now.visible, reinterpret_cast<const char*>(v),
            reinterpret_cast<const char*>(next.packed)};
  }

  // All threads pack the tiles of the documents that want it, a split of a KV head at a time.
  // True if any did.
  bool pack_first(const Team& team) const {
    bool any = false;
    int64_t index = 0, mine = next_task(team, 1);
    for (int64_t s = 0; s < a.documents; ++s) {
      const Document doc = document(s);
      if (!packs_first(doc)) continue;
      any = true;
      const int64_t first = first_key(a.rows, doc.first) / kTile;
      const int64_t end = divide_up(end_key(a.rows, doc.keys, doc.first + doc.count - 1), kTile);
      for (int64_t head = 0; head < a.rows.kv_heads; ++head)
        for (int64_t tile = first; tile < end; tile += kSplit / kTile, ++index) {
          if (index != mine) continue;
          for (int64_t t = tile; t < smaller(end, tile + kSplit / kTile); ++t) {
            const Place at = place(doc, s, head, t), next = place(doc, s, head, t + 1);
            if (at.given) pack(at, next.given ? next : at, at.packed, at.packed + key_words());
          }
          mine = next_task(team, 1);
        }
    }
    return any;
  }
};

// Rows of o and lse outside every document.
void clear_uncovered(const AttentionArgs& a, int64_t begin, int64_t end) {
  clear_rows(a.rows, begin, end);
  for (int64_t head = 0; head < a.rows.heads; ++head)
    for (int64_t t = begin; t < end; ++t) a.rows.lse[head * a.queries + t] = -__builtin_inff();
}

template <class E>
void run(const AttentionArgs& a, const Team& team) {
  const NaturalSource<E> source{a};
  int64_t longest = 0, covered = a.cu_seqlens_q ? 0 : a.queries;
  for (int64_t s = 0; s < a.documents; ++s) {
    const Document doc = source.document(s);
    longest = larger(longest, doc.keys);
    if (a.cu_seqlens_q) covered = larger(covered, doc.begin + doc.count);
  }
  if (a.cu_seqlens_q && team.thread == 0) clear_uncovered(a, covered, a.queries);
  if (source.pack_first(team)) team_sync(team);
  attend<E>(a.rows, source, a.rows.partials && longest > kSplit, true, team);
}

}  // namespace

void attention(const AttentionArgs& a, const Team& team) {
  if (a.rows.dtype == DType::bf16)
    run<Bf16>(a, team);
  else if (a.rows.dtype == DType::f16)
    run<F16>(a, team);
  else
    run<F32>(a, team);
}

}  // namespace fastllm::FASTLLM_ISA
