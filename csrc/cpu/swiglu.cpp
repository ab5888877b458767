// silu(gate) * up, elementwise: bound by the exponential and the division while rows are in cache,
// else by memory. The tail of a row goes through the same vector code, so that an element's bits do
// not depend on its column.
#include "cpu/sigmoid.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

FASTLLM_INLINE vf silu_times(vf gate, vf up) { return gate / (1.f + exp_minus(gate)) * up; }

template <class T>
void swiglu_columns(T* y, const T* gate, const T* up, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) store(y + c, silu_times(load(gate + c), load(up + c)));
  if (c < n) store_n(y + c, silu_times(load_n(gate + c, n - c), load_n(up + c, n - c)), n - c);
}

}  // namespace

void swiglu(const SwigluArgs& a, const Team& team) {
  // One row of a decode step is shared by the team too: the unit is a run of columns, not a row.
  constexpr int64_t kColumns = 256;
  const int64_t runs = (a.n + kColumns - 1) / kColumns;
  int64_t begin, end;
  my_share(team, a.outer * a.inner * runs, 1, &begin, &end);
  dispatch_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / runs, first = i % runs * kColumns;
      const int64_t outer = row / a.inner, inner = row % a.inner;
      const int64_t n = a.n - first < kColumns ? a.n - first : kColumns;
      swiglu_columns(
          static_cast<T*>(a.y) + row * a.n + first,
          static_cast<const T*>(a.gate) + outer * a.gate_outer + inner * a.gate_inner + first,
          static_cast<const T*>(a.up) + outer * a.up_outer + inner * a.up_inner + first, n);
    }
  });
}

}  // namespace fastllm::FASTLLM_ISA
