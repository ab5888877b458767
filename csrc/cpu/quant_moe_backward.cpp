// The gradients of packed experts' inputs (see fastllm/ops/quant_moe_backward.py): the rows' half of
// moe_backward, over strips of columns that are dequantized on the way, and the sums over slots.
#include "cpu/moe_rows.h"
#include "cpu/unpack_strip.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct PackedStrips {
  const QuantMoeBackwardArgs& a;

  void strip(const ExpertWeights& w, int64_t n, int64_t k, int64_t expert, int64_t panel, int count,
             uint32_t* to) const {
    const auto* data = reinterpret_cast<const uint8_t*>(w.data) + expert * w.expert_bytes;
    const auto* scales = reinterpret_cast<const uint8_t*>(w.scales) + expert * w.expert_scales;
    unpack_strip(a.rows.type, {data, scales, w.format, n, k}, panel, count, to);
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
  const PackedStrips weights{a};
  const RowsBackward<D, PackedStrips> rows(a.rows, weights, team);
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
