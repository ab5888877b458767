#include <cmath>

#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

AdamwStepArgs adamw_step_args(Tensor param, Tensor master, Tensor exp_avg, Tensor exp_avg_sq,
                              Tensor grad, Tensor grad_scale, double lr, double beta1, double beta2,
                              double eps, double weight_decay, int64_t step) {
  const char* op = "adamw_step";
  check(param.given() && is_float(param) && is_float(grad), op, "param and grad: f32 or bf16");
  check(master.given() == (param.dtype == DType::bf16), op,
        "a bf16 param, and no other, has a master");
  check(exp_avg.dtype == DType::f32 && exp_avg_sq.dtype == DType::f32 &&
            (!master.given() || master.dtype == DType::f32),
        op, "moments and master must be f32");
  for (const Tensor& t : {param, exp_avg, exp_avg_sq, grad})
    check(t.contiguous() && same_shape(t, param), op,
          "all tensors must be contiguous, of one shape");
  check(!master.given() || (master.contiguous() && same_shape(master, param)), op,
        "master must be contiguous and shaped like param");
  check(!grad_scale.given() || (grad_scale.dtype == DType::f32 && grad_scale.numel() == 1), op,
        "grad_scale must be one f32 value");
  check(step >= 1, op, "steps count from 1");
  const double steps = static_cast<double>(step);
  return {.param = param.data,
          .master = master.as<float>(),
          .exp_avg = exp_avg.as<float>(),
          .exp_avg_sq = exp_avg_sq.as<float>(),
          .grad = grad.data,
          .grad_scale = grad_scale.as<float>(),
          .param_type = param.dtype,
          .grad_type = grad.dtype,
          .count = param.numel(),
          .decay = static_cast<float>(1 - lr * weight_decay),
          .new_share = static_cast<float>(1 - beta1),
          .keep_sq = static_cast<float>(beta2),
          .new_share_sq = static_cast<float>(1 - beta2),
          .rate = static_cast<float>(lr / (1 - std::pow(beta1, steps))),
          .inverse_root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, steps))),
          .eps = static_cast<float>(eps)};
}

}  // namespace fastllm
