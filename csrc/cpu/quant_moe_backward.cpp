// The gradients of packed experts' inputs (see fastllm/ops/quant_moe_backward.py): the rows' half of
// moe_backward, over strips of columns that are dequantized on the way, and the sums over slots.
#include "cpu/moe_rows.h"
#include "cpu/unpack_strip.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D>
struct PackedStrips {
  const QuantMoeBackwardArgs& a;

  static void strip(const ExpertWeights& w, int64_t n, int64_t k, int64_t expert, int64_t panel,
                    int count, uint32_t* to) {
    const auto* data = reinterpret_cast<const uint8_t*>(w.data) + expert * w.expert_bytes;
    const PackedRows rows{data, w.scales + expert * w.expert_scales, n, k};
    switch (w.format) {
      case Format::q4_0: return unpack_strip<Q4_0, D>(rows, panel, count, to);
      case Format::q4_1: return unpack_strip<Q4_1, D>(rows, panel, count, to);
      case Format::q8_0: return unpack_strip<Q8_0, D>(rows, panel, count, to);
      case Format::bf16: return unpack_strip<Bf16Rows, D>(rows, panel, count, to);
      case Format::f32: return unpack_strip<F32Rows, D>(rows, panel, count, to);
      default: return;
    }
  }
  void down(int64_t expert, int64_t panel, int count, uint32_t* to) const {
    strip(a.down, a.rows.hidden, a.rows.inner, expert, panel, count, to);
  }
  void gate_up(int64_t expert, int64_t panel, int count, uint32_t* to) const {
    strip(a.gate_up, 2 * a.rows.inner, a.rows.hidden, expert, panel, count, to);
  }
};

template <class D>
void quant_moe_backward(const QuantMoeBackwardArgs& a, const Team& team) {
  const PackedStrips<D> weights{a};
  const RowsBackward<D, PackedStrips<D>> rows(a.rows, weights, team);
  rows.run();
  for (int64_t task; (task = next_task(team, 1)) < rows.token_tasks();) rows.sum_tokens(task);
}

}  // namespace

void quant_moe_backward(const QuantMoeBackwardArgs& a, const Team& team) {
  if (a.rows.type == DType::bf16)
    quant_moe_backward<Bf16Dense>(a, team);
  else
    quant_moe_backward<Float32>(a, team);
}

}  // namespace fastllm::FASTLLM_ISA
