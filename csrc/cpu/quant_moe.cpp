// A layer of experts whose weights are packed. With int8 activations x is quantized once a token,
// before the experts' rows are gathered.
#include "cpu/moe_layer.h"
#include "cpu/moe_quantized.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Calls body with the experts' panels as the tiles of their format and mode read them; `prepared`:
// rows were quantized before.
template <class Body>
void with_experts(const MoeLayer& l, const ExpertWeights& w, int64_t n, int64_t k, bool prepared,
                  const Body& body) {
  if (w.format == Format::bf16) {
    DensePanels<Bf16Dense> experts(w, n, k);
    body(experts);
  } else if (w.format == Format::f32) {
    DensePanels<Float32> experts(w, n, k);
    body(experts);
  } else {
    QuantExperts experts(w, n, k, l.a.type, l.a.mode, prepared);
    body(experts);
  }
}

// This thread's tokens as int8 records; then all threads wait for each other.
void prepare_tokens(const MoeLayer& l, const Team& team) {
  const MoeArgs& a = l.a;
  const QuantExperts experts(a.gate_up, 2 * a.inner, a.hidden, a.type, a.mode, false);
  char* records = a.scratch + l.parts.quantized;
  int64_t begin, end;
  my_share(team, a.tokens, 1, &begin, &end);
  for (int64_t t = begin; t < end; ++t)
    experts.prepare(a.x + t * a.x_stride * l.element(), records + t * experts.row_bytes());
  team_sync(team);
}

}  // namespace

void quant_moe(const MoeArgs& a, const Team& team) {
  const MoeLayer l(a);
  const bool prepared =
      !is_dense(a.gate_up.format) && mode_of(a.gate_up.format, a.mode) == Activation::int8;
  with_experts(l, a.gate_up, 2 * a.inner, a.hidden, prepared, [&](auto& gate_up) {
    const char* x = prepared ? a.scratch + l.parts.quantized : a.x;
    const int64_t stride = prepared ? gate_up.row_bytes() : a.x_stride * l.element();
    first_product(
        l, gate_up, [&](int64_t token) { return x + token * stride; }, team,
        [&] {
          clear_row_of(l, team);
          if (prepared) prepare_tokens(l, team);
        });
  });
  with_experts(l, a.down, a.hidden, a.inner, false,
               [&](auto& down) { second_product(l, down, team); });
  fill_row_of(l, team);
  team_sync(team);
  combine_experts(l, team);
}

}  // namespace fastllm::FASTLLM_ISA
