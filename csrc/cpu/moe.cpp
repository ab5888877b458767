// A layer of experts whose weights lie in rows or transposed: strips are packed on the way, with the
// tiles of linear, so that the bits are linear's.
#include "cpu/moe_columns.h"
#include "cpu/moe_layer.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// body(the weights, which have `sides` times n outputs of k columns, in their layout).
template <class D, class Body>
void with_experts(const ExpertWeights& weights, int64_t n, int64_t k, int sides, const Body& body) {
  if (weights.columns) {
    ColumnExperts<D> w(weights, n, k, sides);
    return body(w);
  }
  PlainExperts<D> w(weights, k, sides);
  body(w);
}

template <class D>
void run(const MoeArgs& a, const Team& team) {
  const MoeLayer l(a);
  const int64_t stride = a.x_stride * l.element();
  with_experts<D>(a.gate_up, a.inner, a.hidden, 2, [&](auto& gate_up) {
    first_product(
        l, gate_up, [&](int64_t token) { return a.x + token * stride; }, team,
        [&] { clear_row_of(l, team); });
  });
  with_experts<D>(a.down, a.hidden, a.inner, 1, [&](auto& down) { second_product(l, down, team); });
  fill_row_of(l, team);
  team_sync(team);
  combine_experts(l, team);
}

}  // namespace

void moe(const MoeArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    run<Bf16Dense>(a, team);
  else
    run<Float32>(a, team);
}

}  // namespace fastllm::FASTLLM_ISA
