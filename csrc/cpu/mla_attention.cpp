// Attention over the compressed cache of latent attention: one KV head for all heads, whose values
// are the first columns of its keys (attention_block.h). Rows lie in natural order: a block packs
// each tile once for its rows of all heads, so a token's position is read once.
#include "cpu/attention_paged.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class E>
struct LatentSource {
  using Elem = typename E::Elem;
  const MlaAttentionArgs& a;

  struct Place {
    bool given;
    NaturalRows<Elem> rows;
    uint64_t visible;
  };

  int64_t documents() const { return a.paging.sequences; }
  Document document(int64_t s) const { return paged_document(a.paging, a.rows, s); }

  Place place(const Document& doc, int64_t s, int64_t, int64_t tile) const {
    const int64_t page = page_at(a.paging, s, tile * kTile);
    const int64_t n = smaller(kTile, doc.keys - tile * kTile);
    if (page < 0 || n <= 0) return {};
    const Elem* rows = static_cast<const Elem*>(a.cache) +
                       (page * a.paging.page_size + tile * kTile % a.paging.page_size) * a.rows.dim;
    return {true, {rows, rows, a.rows.dim, a.rows.dim}, first_bits(n)};
  }

  Tile<E> words(const TileScratch<E>& scratch, const Place& now, const Place& next, bool) const {
    pack_tile<E>(scratch.k, scratch.v, now.rows, next.rows, now.visible, kTile, a.rows.dim,
                 a.rows.value_dim);
    return {scratch.k, scratch.v, now.visible};
  }
};

template <class E>
void run(const MlaAttentionArgs& a, const Team& team) {
  attend_paged<E>(a.paging, a.rows, LatentSource<E>{a}, true, team);
}

}  // namespace

void mla_attention(const MlaAttentionArgs& a, const Team& team) {
  if (a.rows.dtype == DType::bf16)
    run<Bf16>(a, team);
  else if (a.rows.dtype == DType::f16)
    run<F16>(a, team);
  else
    run<F32>(a, team);
}

}  // namespace fastllm::FASTLLM_ISA
