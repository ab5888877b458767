#include "api/packed.h"
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

LinearArgs lora_add_args(Tensor y, Tensor t, Tensor b, Tensor base, double scale, Tensor scratch) {
  const char* op = "lora_add";
  LinearArgs args = linear_args(y, t, b, Tensor{}, scratch);
  check(base.dtype == DType::f32 && base.ndim == 2 && rows_contiguous(base) && same_shape(base, y),
        op, "base must be f32 [m, n], rows contiguous");
  args.out.base = base.as<float>();
  args.out.base_stride = base.stride[0];
  args.out.scale = static_cast<float>(scale);
  return args;
}

}  // namespace fastllm
