// Writing new rows, latent and rotated key, into the compressed pages: a copy of each.
#include "cpu/paging.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {

void append_mla(const AppendMlaArgs& a, const Team& team) {
  const Paging& p = a.paging;
  int64_t begin, end;
  my_share(team, p.tokens, 1, &begin, &end);
  if (begin == end) return;
  for (int64_t s = 0; s < p.sequences; ++s) {
    const Sequence seq = sequence_at(p, s);
    if (seq.length == 0) continue;
    const int64_t low = seq.begin > begin ? seq.begin : begin, high = seq.end < end ? seq.end : end;
    for (int64_t token = low; token < high; ++token) {
      const int64_t position = seq.first + (token - seq.begin);
      const int64_t page = page_at(p, s, position);
      if (page < 0) continue;
      char* row = a.cache + (page * p.page_size + position % p.page_size) *
                                (a.latent_bytes + a.rope_key_bytes);
      __builtin_memcpy(row, a.latent + token * a.latent_stride, a.latent_bytes);
      __builtin_memcpy(row + a.latent_bytes, a.rope_key + token * a.rope_key_stride,
                       a.rope_key_bytes);
    }
  }
}

}  // namespace fastllm::FASTLLM_ISA
