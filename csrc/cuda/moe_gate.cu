// The router in one launch: scores, selection, weights, statistics and the counting sort of the
// slots (moe_gate_rows.cuh, moe_gate_sort.cuh). Up to 64 blocks of 16 warps, all on the GPU at once;
// between the halves they wait for each other, so that nothing returns to the host.
//
// What bounds it: latency. 4,096 tokens of 256 experts are 4.2 MB of logits, 1.3 us of an H100's
// 3.35 TB/s, and 0.4 MB written. A warp's token of 256 experts, k = 8: 8 loads in flight (about 700
// cycles of device memory), 5 + 5 shuffles for its maximum and sum (150 cycles), 8 exponentials and
// divisions (130), and 8 picks of 8 compares and two warp-wide reductions (70 each, 560): 1,600
// cycles, 0.9 us at 1.75 GHz, 16 warps of an SM side by side. By number of tokens:
//   1 to 16       one block, one token a warp: 1 us of work and no wait for other blocks
//   1,024         64 blocks, one token a warp: the same, and the wait (about 1.5 us)
//   4,096         4 tokens a warp: 3.5 us, the wait, the sort
// The sort: thread e reads 64 counts, 8 at a time (8 x 600 cycles, 2.7 us), and walks its block's
// 512 ids in shared memory twice, 4 at a time (128 steps of 12 cycles, 0.9 us each); slots are
// written as they come, 128 KB in all. About 8 us in all where separate kernels for scores, sums,
// counts, offsets and slots take 5 launches of 2 to 3 us, inside a graph too.
// More tokens than 8,192 are the other kernels' work: there launches no longer count.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/moe_gate_sort.cuh"

namespace fastllm::cuda {
namespace {

template <int V>
__global__ void __launch_bounds__(kGateThreads, 1)
    gate_kernel(const __grid_constant__ MoeGateParams p) {
  gate_rows<V>(p);
  if (gridDim.x > 1)
    cooperative_groups::this_grid().sync();
  else
    block_barrier();
  sort_slots(p);
}

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("moe_gate (CUDA): ") + what + ": " +
                             cudaGetErrorString(status));
}

}  // namespace

void moe_gate(const MoeGateCall& call, void* stream) {
  visit_gate(call, [&](auto values) {
    const void* kernel = reinterpret_cast<const void*>(gate_kernel<decltype(values)::value>);
    const auto shared = static_cast<size_t>(call.p.shared.bytes);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)),
               "shared memory");
    void* arguments[] = {const_cast<MoeGateParams*>(&call.p)};
    const dim3 grid(static_cast<unsigned>(call.blocks)), block(kGateThreads);
    auto* on = static_cast<cudaStream_t>(stream);
    // One block waits for nobody, and is launched without the cooperative launch's own cost.
    check_cuda(call.blocks > 1
                   ? cudaLaunchCooperativeKernel(kernel, grid, block, arguments, shared, on)
                   : cudaLaunchKernel(kernel, grid, block, arguments, shared, on),
               "launch");
  });
}

}  // namespace fastllm::cuda
