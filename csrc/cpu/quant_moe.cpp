// A layer of experts whose weights are packed. With int8 activations x is quantized once a token,
// before the experts' rows are gathered.
#include "cpu/moe_layer.h"
#include "cpu/moe_quantized.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Calls body with the experts' panels as the tiles of their format and mode read them; `records`:
// in mode int8, rows were quantized before.
template <class F, class Body>
void with_quantized(const MoeLayer& l, const ExpertWeights& w, int64_t n, int64_t k, bool records,
                    const Body& body) {
  if (l.a.mode == Activation::int8) {
    Int8Experts<F> experts(w, n, k, l.a.type, records);
    return body(experts);
  }
  if constexpr (kHaveBf16Dot)
    if (l.a.mode == Activation::bf16) {
      FloatExperts<F, PairDot> experts(w, n, k, l.a.type);
      return body(experts);
    }
  FloatExperts<F, FloatDot> experts(w, n, k, l.a.type);
  body(experts);
}

template <class Body>
void with_experts(const MoeLayer& l, const ExpertWeights& w, int64_t n, int64_t k, bool records,
                  const Body& body) {
  switch (w.format) {
    case Format::q4_0: return with_quantized<Q4_0>(l, w, n, k, records, body);
    case Format::q4_1: return with_quantized<Q4_1>(l, w, n, k, records, body);
    case Format::q8_0: return with_quantized<Q8_0>(l, w, n, k, records, body);
    case Format::bf16: {
      DensePanels<Bf16Dense> experts(w, n, k);
      return body(experts);
    }
    case Format::f32: {
      DensePanels<Float32> experts(w, n, k);
      return body(experts);
    }
    default: return;
  }
}

template <class F>
void quantize_tokens(const MoeLayer& l, const Team& team) {
  const MoeArgs& a = l.a;
  const int64_t blocks = a.hidden / kBlock;
  auto* records = reinterpret_cast<Int8Block*>(a.scratch + l.parts.quantized);
  int64_t begin, end;
  my_share(team, a.tokens, 1, &begin, &end);
  for (int64_t t = begin; t < end; ++t)
    dispatch_float(a.type, [&](auto type) {
      const auto* x = reinterpret_cast<const decltype(type)*>(a.x) + t * a.x_stride;
      quantize_row<F>(x, a.hidden, records + t * blocks, 1);
    });
}

// Whether x was quantized, which all threads wait for.
bool quantize_x(const MoeLayer& l, const Team& team) {
  if (l.a.mode != Activation::int8) return false;
  switch (l.a.gate_up.format) {
    case Format::q4_0: quantize_tokens<Q4_0>(l, team); break;
    case Format::q4_1: quantize_tokens<Q4_1>(l, team); break;
    case Format::q8_0: quantize_tokens<Q8_0>(l, team); break;
    default: return false;
  }
  team_sync(team);
  return true;
}

}  // namespace

void quant_moe(const MoeArgs& a, const Team& team) {
  const MoeLayer l(a);
  clear_row_of(l, team);
  const bool records = quantize_x(l, team);
  const char* x = records ? a.scratch + l.parts.quantized : a.x;
  const int64_t stride = records ? a.hidden / kBlock * static_cast<int64_t>(sizeof(Int8Block))
                                 : a.x_stride * l.element();
  with_experts(l, a.gate_up, 2 * a.inner, a.hidden, records, [&](auto& gate_up) {
    first_product(l, gate_up, [&](int64_t token) { return x + token * stride; }, team);
  });
  with_experts(l, a.down, a.hidden, a.inner, false,
               [&](auto& down) { second_product(l, down, team); });
  fill_row_of(l, team);
  team_sync(team);
  combine_experts(l, team);
}

}  // namespace fastllm::FASTLLM_ISA
