// One AdamW step: every stream is read and written once. Tails go through the same vector code, so
// that an element's bits depend on nothing but its own numbers.
#include "cpu/integers.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct Element {
  vf weight, exp_avg, exp_avg_sq;
};

FASTLLM_INLINE Element stepped(const AdamwStepArgs& a, Element e, vf grad) {
  e.exp_avg = e.exp_avg + (grad - e.exp_avg) * a.new_share;
  e.exp_avg_sq = e.exp_avg_sq * a.keep_sq + grad * grad * a.new_share_sq;
  const vf denominator = vsqrt(e.exp_avg_sq) * a.inverse_root + a.eps;
  e.weight = e.weight * a.decay - e.exp_avg * a.rate / denominator;
  return e;
}

template <class P, class G>
void step_elements(const AdamwStepArgs& a, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(a.param);
  const G* grad = static_cast<const G*>(a.grad);
  const float scale = a.grad_scale ? *a.grad_scale : 1.f;
  float *m = a.exp_avg, *v = a.exp_avg_sq;
  float* weight = a.master;
  if constexpr (sizeof(P) == sizeof(float)) weight = static_cast<float*>(a.param);
  int64_t i = begin;
  for (; i + VL <= end; i += VL) {
    const Element e =
        stepped(a, {vload(weight + i), vload(m + i), vload(v + i)}, load(grad + i) * scale);
    vstore(m + i, e.exp_avg);
    vstore(v + i, e.exp_avg_sq);
    vstore(weight + i, e.weight);
    if constexpr (sizeof(P) != sizeof(float)) store(param + i, e.weight);
  }
  if (i < end) {
    const int64_t rest = end - i;
    const Element e =
        stepped(a, {load_n(weight + i, rest), load_n(m + i, rest), load_n(v + i, rest)},
                load_n(grad + i, rest) * scale);
    store_n(m + i, e.exp_avg, rest);
    store_n(v + i, e.exp_avg_sq, rest);
    store_n(weight + i, e.weight, rest);
    if constexpr (sizeof(P) != sizeof(float)) store_n(param + i, e.weight, rest);
  }
}

}  // namespace

void adamw_step(const AdamwStepArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, a.count, 1024, &begin, &end);
  dispatch_float(a.param_type, [&](auto param) {
    dispatch_float(a.grad_type, [&](auto grad) {
      step_elements<decltype(param), decltype(grad)>(a, begin, end);
    });
  });
}

}  // namespace fastllm::FASTLLM_ISA
