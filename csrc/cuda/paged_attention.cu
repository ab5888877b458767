// Launches of paged attention: the kernels are in paged_attention_split.cuh and _combine.cuh.
//
// What bounds it. A cached (position, KV head) is (D + Dv) elements: 512 bytes at D = 128 in bf16,
// 264 in int8 with its scales, read once for all heads of the group. Its products are 16 rows x 2 x
// (D + Dv) = 8,192 operations, padding rows included: 16 or 31 a byte, where the mma.sync of an
// H100 (about 600 TFLOP/s) could do 180 a byte of its 3.35 TB/s. So: bytes.
//
// Occupancy (registers as tests/test_cuda_build.py prints them for sm_90a; shared memory is the two
// slots of K, two of V, 16 rows of Q and 3.3 KiB), and bytes under way, three of the four slots:
//
//   cache      D/Dv     registers  shared    blocks of an SM (H100 | A100)  under way (H100)
//   bf16       64/64    110         37 KiB   4 | 4                           96 KiB
//   bf16       128/128  136         71 KiB   3 | 2                          144 KiB
//   bf16       256/256  150        139 KiB   1 | 1                           96 KiB
//   int8       128/128  116         40 KiB   4 | 4                           99 KiB
//   bf16 alias 576/512  168        165 KiB   1 | -                           72 KiB
//
// Needed by Little's law: 3.35 TB/s x 700 ns / 132 SMs = 18 KB a multiprocessor (A100: 2.0 TB/s x
// 600 ns / 108 = 11 KB). The surplus is what rides over the three barriers of a tile: with two or
// more blocks on an SM one copies while the other multiplies. A tile at D = 128 is 32 KiB, 1,290 ns
// of one SM's share of the bandwidth, and about 500 ns of dependent work (8 products in a row, two
// exchanges through shared memory, 4 products): one block would do. Instructions of a warp and tile
// on the common path, counted in the machine code: about 430 at D = 128 in bf16 against the 2,200
// cycles of that share, 750 against 1,150 in int8; but 520 against 580 at D = 64 in int8, which
// will be bound by issue before it is bound by memory.
//
// What is lost. The first bytes of a block wait for three dependent reads (length, block table, the
// tile): about 2 us, hidden where other blocks of the SM are copying, paid once by the first wave.
// Partial results are 2 x 4 (Dv + 2) bytes a row and split of 512: 1.6% of the traffic for a group
// of 4 at D = 128. The combination is a second launch of about 3 us. With 92% of the peak as what
// any kernel gets out of HBM, 5.5 us fixed, 32/8 heads x 128 in bf16 (4 KiB a position), an H100
// should show, until it has been measured: batch 1 with 4k positions 45% of its peak, 16k 73%, 64k
// 87%; batch 8 with 16k 89%. int8 halves the bytes, so it reaches the same share at twice the
// length.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/paged_attention_instances.cuh"

namespace fastllm::cuda {
namespace {

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("paged_attention (CUDA): ") + what + ": " +
                             cudaGetErrorString(status));
}

dim3 dim3_of(const GridSize& grid) { return dim3(grid.x, grid.y, grid.z); }

}  // namespace

void paged_attention(const PagedAttentionCall& call, void* stream) {
  const PagedAttentionParams& p = call.p;
  if (p.tokens == 0 || call.sequences == 0) return;
  auto* on = static_cast<cudaStream_t>(stream);
  visit_instance(call, [&](auto instance) {
    using I = decltype(instance);
    auto* kernel = split_kernel<typename I::T, I::kCodes, I::kGroups, I::kAlias, kStages>;
    // All of L1 as shared memory: the slots under way are what hides the latency of memory.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100),
               "shared memory carveout");
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.shared.bytes),
        "shared memory for these head dims");
    kernel<<<dim3_of(split_grid(call)), kThreads, p.shared.bytes, on>>>(p);
    check_cuda(cudaGetLastError(), "launch");
    if (!p.partials) return;
    combine_kernel<typename I::T><<<dim3_of(combine_grid(call)), kThreads, 0, on>>>(p);
    check_cuda(cudaGetLastError(), "launch of the combination");
  });
}

}  // namespace fastllm::cuda
