// Every native op: its argument struct (plain pointers and numbers: a graph keeps a copy), the function that checks tensors and fills it, and its place in
// the kernel table. Adding an op: a struct and a *_args function here, its checks in api/<op>.cpp, its
// kernel in cpu/<op>.cpp, a row in cpu/kernels.cpp, a line in bindings.cpp.
#pragma once
#include <cstdint>

#include "common/team.h"
#include "common/tensor.h"

namespace fastllm {

// y[rows, n] = (h * rsqrt(mean(h^2) + eps)) * weight with h = x, or h = residual + x (then h is stored).
// Rows are indexed [outer, inner] so that heads of a fused projection need no copy. One row per task
// step; bound by memory.
struct RmsNormArgs {
  void* y;                // [outer, inner, n] contiguous
  const void* x;          // [outer, inner, n], rows contiguous
  const void* weight;     // [n]
  const float* residual;  // [outer, inner, n] contiguous, or null
  float* h;               // where residual + x goes, or null
  DType y_type, x_type, weight_type;
  int64_t outer, inner, n, x_outer_stride, x_inner_stride;
  float eps;
};
RmsNormArgs rms_norm_args(Tensor y, Tensor x, Tensor weight, Tensor residual, Tensor h, double eps);

struct Kernels {
  Kernel<RmsNormArgs>* rms_norm;
};

namespace generic {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace fastllm
