// act(gate) * up, elementwise: bound by the exponential and the division while rows are in cache,
// else by memory. The tail of a row goes through the same vector code, so that an element's bits do
// not depend on its column.
#include "cpu/gated_activation.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <Gating gating, class T>
void swiglu_columns(T* y, const T* gate, const T* up, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) store(y + c, gated<gating>(load(gate + c), load(up + c)));
  if (c < n) store_n(y + c, gated<gating>(load_n(gate + c, n - c), load_n(up + c, n - c)), n - c);
}

// Runs of columns [begin, end), counted over all rows.
template <Gating gating, class T>
void swiglu_runs(const SwigluArgs& a, int64_t columns, int64_t begin, int64_t end) {
  const int64_t runs = (a.n + columns - 1) / columns;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / runs, first = i % runs * columns;
    const int64_t outer = row / a.inner, inner = row % a.inner;
    swiglu_columns<gating>(
        static_cast<T*>(a.y) + row * a.n + first,
        static_cast<const T*>(a.gate) + outer * a.gate_outer + inner * a.gate_inner + first,
        static_cast<const T*>(a.up) + outer * a.up_outer + inner * a.up_inner + first,
        a.n - first < columns ? a.n - first : columns);
  }
}

}  // namespace

void swiglu(const SwigluArgs& a, const Team& team) {
  // One row of a decode step is shared by the team too: the unit is a run of columns, not a row.
  constexpr int64_t kColumns = 256;
  int64_t begin, end;
  my_share(team, a.outer * a.inner * ((a.n + kColumns - 1) / kColumns), 1, &begin, &end);
  dispatch_float(a.dtype, [&](auto type) {
    dispatch_gating(a.gating, [&](auto gating) {
      swiglu_runs<decltype(gating)::value, decltype(type)>(a, kColumns, begin, end);
    });
  });
}

}  // namespace fastllm::FASTLLM_ISA
