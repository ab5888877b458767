// The kernel table of one ISA level.
#include "ops.h"

namespace fastllm::FASTLLM_ISA {

Kernel<RmsNormArgs> rms_norm;

const Kernels kernels = {
    .rms_norm = rms_norm,
};

}  // namespace fastllm::FASTLLM_ISA
