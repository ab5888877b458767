// What the low-batch product with packed weights is given. Plain C++: the launcher fills it, the
// kernels and their CPU emulation read it.
#pragma once
#include <cstdint>

#include "common/formats.h"
#include "common/tensor.h"

namespace fastllm::cuda {

constexpr int kProductWarps = 8;  // they share the columns of a block's rows
constexpr int kProductThreads = 32 * kProductWarps;
constexpr int kProductTokens = 32;      // at most: more are Triton's work
constexpr int kSegmentBytes = 128;      // of a row, in one step of a warp: 256 columns of 4 bits
constexpr int kMostSplits = 8;          // of K over blocks
constexpr int64_t kManyRows = 8192;     // from here on a warp takes 32 rows, not 16
constexpr int64_t kWantedBlocks = 264;  // two for each of an H100's 132 multiprocessors

// How 4 bytes become codes.
enum class Codes : uint8_t { nibble_offset, nibble, nf4, int8, e4m3 };
// What a row's scales are.
enum class Scales : uint8_t { half, half_min, half_zero, single, super_min, nested };

constexpr int code_words(Codes codes) {  // of 4 bytes in a block of 32 columns
  return codes == Codes::int8 || codes == Codes::e4m3 ? 8 : 4;
}

struct QuantMatmulParams {
  const uint8_t* data;    // [n, k / 32, words, 4]
  const uint8_t* scales;  // rows of scale_bytes
  const uint16_t* x;      // bf16 [m, k]
  const void* bias;       // [n], or null
  void* y;                // [m, n]
  float* partials;        // [splits, m, n], or null
  int64_t x_stride, scale_bytes;
  int32_t m, n, k;
  int32_t blocks_of_group;  // blocks of 32 columns under one scale
  int32_t chunk_mask;       // blocks summed before they are scaled, less one: 0, 1 or 3
  int32_t splits, segments_of_split;
  Scales kind;
  bool y_bf16, bias_bf16;
};

// A checked call: what the kernels take, and which instance serves it.
struct QuantMatmulCall {
  QuantMatmulParams p;
  Codes codes;
  int32_t token_tiles, row_tiles;  // of 8 tokens and 16 rows
};

// Blocks of K beside each other, by the weight's shape alone: so is the order of every sum.
inline int32_t product_splits(int64_t n, int64_t segments, int64_t rows_of_block) {
  const int64_t blocks = (n + rows_of_block - 1) / rows_of_block;
  const int64_t wanted = (kWantedBlocks + blocks - 1) / (blocks ? blocks : 1);
  const int64_t most = segments / (2 * kProductWarps);  // two steps for every warp
  const int64_t splits = wanted < most ? wanted : most;
  return static_cast<int32_t>(splits < 1 ? 1 : splits < kMostSplits ? splits : kMostSplits);
}

QuantMatmulCall quant_matmul_call(Tensor y, Tensor x, Tensor data, Tensor scales, int64_t format,
                                  Tensor bias, Tensor partials);
void quant_matmul(const QuantMatmulCall& call, void* stream);

}  // namespace fastllm::cuda
