// Which instance of the kernels serves a call.
#pragma once
#include "cuda/paged_attention_combine.cuh"
#include "cuda/paged_attention_split.cuh"

namespace fastllm::cuda {

// Calls visit(Instance<...>{}) with the instance of the kernels that serves a call.
template <class Element, bool codes, int groups, bool aliased>
struct Instance {
  using T = Element;
  static constexpr bool kCodes = codes, kAlias = aliased;
  static constexpr int kGroups = groups;
};
template <class T, bool kCodes, class Visit>
void visit_dims(const PagedAttentionCall& call, Visit visit) {
  const int widest = call.p.dim > call.p.value_dim ? call.p.dim : call.p.value_dim;
  const int groups = (widest + 63) / 64;
  if (groups <= 1) return visit(Instance<T, kCodes, 1, false>{});
  if (groups <= 2) return visit(Instance<T, kCodes, 2, false>{});
  visit(Instance<T, kCodes, 4, false>{});
}
template <class T, class Visit>
void visit_cache(const PagedAttentionCall& call, Visit visit) {
  if (call.alias) return visit(Instance<T, false, 8, true>{});
  call.codes ? visit_dims<T, true>(call, visit) : visit_dims<T, false>(call, visit);
}
template <class Visit>
void visit_instance(const PagedAttentionCall& call, Visit visit) {
  call.dtype == DType::bf16 ? visit_cache<Bf16>(call, visit) : visit_cache<Fp16>(call, visit);
}

}  // namespace fastllm::cuda
