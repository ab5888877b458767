// Causal attention over the paged cache (attention_block.h). Pages of q's own type are used where
// they lie; int8 and half-precision pages are widened tile by tile, int8 pages for few rows of bf16
// in registers. Bound by arithmetic for prompts (both products at the rate of the dot instruction)
// and by reading the cache for decode.
#include "cpu/attention_paged.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class E>
struct PagedSource {
  const PagedAttentionArgs& a;

  struct Place {
    bool given;
    const char *k, *v;
    int64_t scales;  // where its 64 scales begin
    int64_t keys;    // positions of the tile that exist
  };

  int64_t documents() const { return a.paging.sequences; }
  Document document(int64_t s) const { return paged_document(a.paging, a.rows, s); }

  Place place(const Document& doc, int64_t s, int64_t kv_head, int64_t tile) const {
    const int64_t page = page_at(a.paging, s, tile * kTile);
    if (page < 0) return {};
    const int64_t at =
        (page * a.rows.kv_heads + kv_head) * a.paging.page_size + tile * kTile % a.paging.page_size;
    const int64_t bytes = a.cache_dtype == DType::f32 ? 4 : a.cache_dtype == DType::i8 ? 1 : 2;
    return {true, static_cast<const char*>(a.k_cache) + at * a.rows.dim * bytes,
            static_cast<const char*>(a.v_cache) + at * a.rows.value_dim * bytes, at,
            doc.keys - tile * kTile};
  }

  // Half a tile ahead is best for words: further, what is wanted and what is at hand are more than
  // L1 holds (32/8 heads of 128, a core of 48 KB: 25 GB/s against 31). Codes are half as many
  // bytes and a whole tile ahead is best for them (9/3 heads of 64: 21.0 -> 23.7 GB/s).
  Tile<E> words(const TileScratch<E>& scratch, const Place& now, const Place& next,
                bool once) const {
    using Word = typename E::Word;
    if (a.cache_dtype == DType::i8) {
      if (E::kReadsCodes && once && a.rows.value_dim % 32 == 0)
        return scaled({.k = nullptr,
                       .v = nullptr,
                       .visible = ~uint64_t{0},
                       .ahead_of_k = next.k,
                       .ahead_of_v = next.v,
                       .k_codes = reinterpret_cast<const CodePair*>(now.k),
                       .v_codes = reinterpret_cast<const CodePair*>(now.v)},
                      scratch, now, next);
      return expanded<int8_t>(scratch, now, next);
    }
    if constexpr (__is_same(E, F16))
      return expanded<Half>(scratch, now, next);
    else
      return {reinterpret_cast<const Word*>(now.k), reinterpret_cast<const Word*>(now.v),
              ~uint64_t{0}, now.v, next.k};
  }

  template <class Narrow>
  Tile<E> expanded(const TileScratch<E>& scratch, const Place& now, const Place& next) const {
    expand_keys(scratch.k, reinterpret_cast<const Narrow*>(now.k), a.rows.dim,
                reinterpret_cast<const Narrow*>(next.k));
    expand_values(scratch.v, reinterpret_cast<const Narrow*>(now.v), a.rows.value_dim,
                  reinterpret_cast<const Narrow*>(next.v));
    return scaled({scratch.k, scratch.v, ~uint64_t{0}}, scratch, now, next);
  }

  Tile<E> scaled(Tile<E> tile, const TileScratch<E>& scratch, const Place& now,
                 const Place& next) const {
    if (a.k_scales) {
      tile.k_scale = known_scales(scratch.scale[0], a.k_scales, now, next);
      tile.v_scale = known_scales(scratch.scale[1], a.v_scales, now, next);
    }
    return tile;
  }

  // Scales past the end of the sequence can be anything: P is 0 there, and 0 * NaN is not.
  static const float* known_scales(float* to, const float* scales, const Place& now,
                                   const Place& next) {
    for (int64_t i = 0; i < kTile; i += 64 / sizeof(float))
      _mm_prefetch(reinterpret_cast<const char*>(scales + next.scales + i), _MM_HINT_T0);
    const float* from = scales + now.scales;
    if (now.keys >= kTile) return from;
    for (int64_t i = 0; i < kTile; ++i) to[i] = i < now.keys ? from[i] : 0.f;
    return to;
  }
};

template <class E>
void run(const PagedAttentionArgs& a, const Team& team) {
  const bool local_tiles = a.cache_dtype != a.rows.dtype || a.cache_dtype == DType::f16;
  attend_paged<E>(a.paging, a.rows, PagedSource<E>{a}, local_tiles, team);
}

}  // namespace

void paged_attention(const PagedAttentionArgs& a, const Team& team) {
  if (a.rows.dtype == DType::bf16)
    run<Bf16>(a, team);
  else if (a.rows.dtype == DType::f16)
    run<F16>(a, team);
  else
    run<F32>(a, team);
}

}  // namespace fastllm::FASTLLM_ISA
