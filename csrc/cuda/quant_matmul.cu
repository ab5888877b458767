// The low-batch product with packed weights (quant_matmul_rows.cuh): 1 to 32 tokens in bf16.
//
// What bounds it: reading the weight once. 4096 x 4096 in int4_g128 is 8.7 MB, 2.6 us of an H100's
// 3.35 TB/s, against 10 us for bf16: 3.87x at best. A multiprocessor takes 15 bytes of weights a
// cycle at 1.7 GHz. For 256 bytes (16 rows x 32 columns of 4 bits; 17 cycles) a warp issues, at 8
// tokens: 4 shared loads, 4 x 5 instructions that make pairs of bf16, 2 loads of x, 2 products, and
// per chunk 2 shuffles and 4 FMA: about 40, 10 cycles of the 4 schedulers. NF4 takes 4 x 12 more
// and is bound by issue, at 22 cycles. Under way: 8 warps x 3 stages x 2 KiB x 2 blocks = 96 KiB of
// a multiprocessor, where 600 cycles of latency need 9.
//
// x comes from the L2 cache once for each block: with 16 rows a block, 4096 rows and 8 tokens of
// 4096 columns 16 MB, as many bytes as twice the weight's, at about 5.5 TB/s; so from 8,192 rows on
// a warp takes 32, and above 32 tokens Triton's tiles of 64 rows and more serve.
// Not yet run on a GPU.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/quant_matmul_rows.cuh"

namespace fastllm::cuda {
namespace {

// Two blocks on a multiprocessor leave 128 registers a thread, which 32 rows or 32 tokens exceed.
template <Codes kCodes, int kTokenTiles, int kRowTiles>
__global__ void __launch_bounds__(kProductThreads, kRowTiles == 1 && kTokenTiles <= 2 ? 2 : 1)
    product_kernel(const __grid_constant__ QuantMatmulParams p) {
  product_rows<kCodes, kTokenTiles, kRowTiles>(p);
}
__global__ void __launch_bounds__(kProductThreads)
    sum_kernel(const __grid_constant__ QuantMatmulParams p) {
  product_sum_splits(p);
}

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("quant_matmul (CUDA): ") + what + ": " +
                             cudaGetErrorString(status));
}

}  // namespace

void quant_matmul(const QuantMatmulCall& call, void* stream) {
  const QuantMatmulParams& p = call.p;
  if (p.m == 0 || p.n == 0) return;
  auto* on = static_cast<cudaStream_t>(stream);
  visit_product(call, [&](auto instance) {
    using I = decltype(instance);
    auto* kernel = product_kernel<I::kCodes, I::kTokenTiles, I::kRowTiles>;
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, I::kSharedBytes),
        "shared memory");
    const auto rows = static_cast<unsigned>(16 * I::kRowTiles);
    const dim3 grid((static_cast<unsigned>(p.n) + rows - 1) / rows,
                    static_cast<unsigned>(p.splits));
    kernel<<<grid, kProductThreads, I::kSharedBytes, on>>>(p);
    check_cuda(cudaGetLastError(), "launch");
  });
  if (!p.partials) return;
  const int64_t outputs = static_cast<int64_t>(p.m) * p.n;
  sum_kernel<<<static_cast<unsigned>((outputs + kProductThreads - 1) / kProductThreads),
               kProductThreads, 0, on>>>(p);
  check_cuda(cudaGetLastError(), "launch of the sum");
}

}  // namespace fastllm::cuda
