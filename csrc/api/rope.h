// Checks that ops with rotation tables share.
#pragma once
#include "common/tensor.h"

namespace fastllm {

void check_rope_tables(const char* op, const Tensor& positions, const Tensor& cos,
                       const Tensor& sin, int64_t tokens, int64_t dim);

}  // namespace fastllm
