// The kernel table of one ISA level.
#include "ops.h"

namespace fastllm::FASTLLM_ISA {

Kernel<RmsNormArgs> rms_norm;
Kernel<QuantMatmulArgs> quant_matmul;
Kernel<PackArgs> pack;

const Kernels kernels = {
    .rms_norm = rms_norm,
    .quant_matmul = quant_matmul,
    .pack = pack,
};

}  // namespace fastllm::FASTLLM_ISA
