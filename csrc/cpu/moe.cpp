// A layer of experts whose weights lie in rows: strips are packed on the way, with the tiles of
// linear, so that the bits are linear's.
#include "cpu/moe_layer.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D>
void run(const MoeArgs& a, const Team& team) {
  const MoeLayer l(a);
  PlainExperts<D> gate_up(a.gate_up, a.hidden, 2);
  const int64_t stride = a.x_stride * l.element();
  first_product(
      l, gate_up, [&](int64_t token) { return a.x + token * stride; }, team,
      [&] { clear_row_of(l, team); });
  PlainExperts<D> down(a.down, a.inner, 1);
  second_product(l, down, team);
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
