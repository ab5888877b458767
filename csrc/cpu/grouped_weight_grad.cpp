// dweight[e] = the sum of dy[r]' x[r] over the rows of expert e. A task is a range of an expert's
// outputs over all its rows.
#include "cpu/weight_grad.h"
#include "ops_moe.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D, class Y>
void all_experts(const GroupedWeightGradArgs& a, const Team& team) {
  const auto* dy = static_cast<const Element<D>*>(a.dy);
  const auto* x = static_cast<const Element<D>*>(a.x);
  const auto tasks = [&](int64_t e) {
    return weight_grad_tasks(a.n, expert_span(a.offsets, e, a.m).size(), a.m, team);
  };
  auto* dweight = reinterpret_cast<Y*>(a.dweight);
  const bool streamed = streams_gradient(dweight, a.k, a.experts * a.n * a.k);
  ExpertTasks list{a.experts};
  for (int64_t task; list.find(task = next_task(team), tasks);) {
    const int64_t e = list.expert, begin = expert_span(a.offsets, e, a.m).begin;
    weight_grad<D>(
        dweight + e * a.n * a.k, a.n, a.k, weight_grad_rows(a.n, tasks(e), task - list.first),
        expert_span(a.offsets, e, a.m).size(),
        [&](int64_t r) { return dy + (begin + r) * a.dy_stride; },
        [&](int64_t r) { return x + (begin + r) * a.x_stride; }, streamed);
  }
}

template <class D>
void all_experts(const GroupedWeightGradArgs& a, const Team& team) {
  if (a.dweight_type == DType::bf16)
    all_experts<D, uint16_t>(a, team);
  else
    all_experts<D, float>(a, team);
}

}  // namespace

void grouped_weight_grad(const GroupedWeightGradArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    all_experts<Bf16Dense>(a, team);
  else
    all_experts<Float32>(a, team);
}

}  // namespace fastllm::FASTLLM_ISA
