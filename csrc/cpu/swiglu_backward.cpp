// Gradients of act(gate) * up: dgate = dy * up * act'(gate), dup = dy * act(gate). The tail of a row
// goes through the same vector code, so that an element's bits do not depend on its column.
#include "cpu/gated_activation.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <Gating gating, class T>
void backward_columns(T* dgate, T* dup, const T* dy, const T* gate, const T* up, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) {
    const GatedGradients d = gated_gradients<gating>(load(dy + c), load(gate + c), load(up + c));
    store(dgate + c, d.gate);
    store(dup + c, d.up);
  }
  if (c < n) {
    const int64_t rest = n - c;
    const GatedGradients d =
        gated_gradients<gating>(load_n(dy + c, rest), load_n(gate + c, rest), load_n(up + c, rest));
    store_n(dgate + c, d.gate, rest);
    store_n(dup + c, d.up, rest);
  }
}

template <Gating gating, class T>
void backward_runs(const SwigluBackwardArgs& a, int64_t columns, int64_t begin, int64_t end) {
  const int64_t runs = (a.n + columns - 1) / columns;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / runs, first = i % runs * columns;
    const int64_t outer = row / a.inner, inner = row % a.inner;
    T* both = static_cast<T*>(a.both) + row * 2 * a.n + first;
    backward_columns<gating>(
        both, both + a.n, static_cast<const T*>(a.dy) + row * a.n + first,
        static_cast<const T*>(a.gate) + outer * a.gate_outer + inner * a.gate_inner + first,
        static_cast<const T*>(a.up) + outer * a.up_outer + inner * a.up_inner + first,
        a.n - first < columns ? a.n - first : columns);
  }
}

}  // namespace

void swiglu_backward(const SwigluBackwardArgs& a, const Team& team) {
  constexpr int64_t kColumns = 2048;  // wide rows are shared by the team too
  int64_t begin, end;
  my_share(team, a.outer * a.inner * ((a.n + kColumns - 1) / kColumns), 1, &begin, &end);
  dispatch_float(a.dtype, [&](auto type) {
    dispatch_gating(a.gating, [&](auto gating) {
      backward_runs<decltype(gating)::value, decltype(type)>(a, kColumns, begin, end);
    });
  });
}

}  // namespace fastllm::FASTLLM_ISA
