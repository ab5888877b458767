// Rotary embedding of [tokens, heads]: one head per step, bound by memory.
#include "cpu/rotate.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {

void rope(const RopeArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, a.tokens * a.heads, 1, &begin, &end);
  dispatch_stored_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / a.heads, head = i % a.heads;
      const int64_t row = table_row(a.positions[token], a.table_rows) * a.half;
      rotate_head(static_cast<T*>(a.y) + i * a.dim,
                  static_cast<const T*>(a.x) + token * a.x_token_stride + head * a.x_head_stride,
                  a.cos + row, a.sin + row, a.half, a.dim);
    }
  });
}

}  // namespace fastllm::FASTLLM_ISA
