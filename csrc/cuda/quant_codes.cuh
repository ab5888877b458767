// Codes of packed weights to pairs of bf16, exactly, and their scales.
#pragma once
#include "cuda/codes.cuh"
#include "cuda/quant_matmul_params.h"

namespace fastllm::cuda {

// The low nibbles of four bytes as pairs of bf16: 0x4300 | u is 128 + u, exact for u < 128.
template <bool kOffset>
__device__ __forceinline__ void nibble_pairs(uint32_t nibbles, uint32_t (&pairs)[2]) {
  constexpr uint32_t zero = kOffset ? 0x43084308u : 0x43004300u;  // 136 or 128
  pairs[0] = subtract_pairs<Bf16>(select_bytes(nibbles, 0x43434343u, 0x4140u), zero);
  pairs[1] = subtract_pairs<Bf16>(select_bytes(nibbles, 0x43434343u, 0x4342u), zero);
}

// NormalFloat-4's bf16 table (fastllm/ops/quant_format.py), 16 entries by their low and high bytes.
// A byte permutation looks up 4 codes in 8 entries; the codes' highest bit chooses between two.
// 17 instructions for 4 codes, where arithmetic codes take 5: an H100's multiprocessor issues 4 a
// cycle, so 256 bytes of weights take 18 cycles of the 17 that their memory traffic takes.
__device__ __forceinline__ void nf4_pairs(uint32_t nibbles, uint32_t (&pairs)[2]) {
  const uint32_t couples = (nibbles | nibbles >> 4) & 0x00ff00ffu;
  const uint32_t index = (couples | couples >> 8) & 0x7777u;
  const uint32_t upper = ((nibbles & 0x08080808u) >> 3) * 0xffu;
  const uint32_t low = select_bytes(0xca063280u, 0x00ba3d92u, index) & ~upper;
  const uint32_t low_upper = select_bytes(0xad7c25a3u, 0x803910e2u, index) & upper;
  const uint32_t high = select_bytes(0xbebfbfbfu, 0x00bdbebeu, index) & ~upper;
  const uint32_t high_upper = select_bytes(0x3e3e3e3du, 0x3f3f3f3eu, index) & upper;
  pairs[0] = select_bytes(low | low_upper, high | high_upper, 0x5140u);
  pairs[1] = select_bytes(low | low_upper, high | high_upper, 0x7362u);
}

// e4m3 moved to bf16's fields is 2^-120 of its value, subnormal numbers too.
__device__ __forceinline__ uint32_t e4m3_pair(uint32_t bytes, uint32_t selector) {
  const uint32_t high = select_bytes(bytes, 0u, selector);  // each byte in a high half's place
  return multiply_pairs<Bf16>((high & 0x7f007f00u) >> 4 | (high & 0x80008000u), 0x7b807b80u);
}

// Columns 16 half + 4 i to 16 half + 4 i + 3 of a block as two pairs. Of 4 bits: `word` is word i,
// whose low nibbles are the first half; of 8 bits: word 4 half + i.
template <Codes kCodes>
__device__ __forceinline__ void code_pairs(uint32_t word, int half, uint32_t (&pairs)[2]) {
  if constexpr (kCodes == Codes::int8) {
    pairs[0] = codes_to_pair<Bf16>(word, 0x4140u);
    pairs[1] = codes_to_pair<Bf16>(word, 0x4342u);
  } else if constexpr (kCodes == Codes::e4m3) {
    pairs[0] = e4m3_pair(word, 0x1404u);
    pairs[1] = e4m3_pair(word, 0x3424u);
  } else {
    const uint32_t nibbles = word >> (4 * half) & 0x0f0f0f0fu;
    if constexpr (kCodes == Codes::nf4)
      nf4_pairs(nibbles, pairs);
    else
      nibble_pairs<kCodes == Codes::nibble_offset>(nibbles, pairs);
  }
}

// Scale and minimum of a block of 32 columns of a row.
__device__ __forceinline__ float2 scale_of(const QuantMatmulParams& p, int row, int block) {
  const uint8_t* scales = p.scales + row * p.scale_bytes;
  const int group = block / p.blocks_of_group;
  if (p.kind == Scales::half) {
    return {from_half<Fp16>(load(reinterpret_cast<const uint16_t*>(scales) + group)), 0.f};
  } else if (p.kind == Scales::single) {
    return {load(reinterpret_cast<const float*>(scales) + group), 0.f};
  } else if (p.kind == Scales::nested) {
    const float whole = load(reinterpret_cast<const float*>(scales));
    return {whole * static_cast<float>(load(scales + 4 + group)), 0.f};
  } else if (p.kind == Scales::super_min) {
    const uint8_t* record = scales + block / 8 * 20;
    const uint32_t both = load(reinterpret_cast<const uint32_t*>(record));
    const uint32_t sub = load(reinterpret_cast<const uint16_t*>(record + 4) + block % 8);
    return {from_half<Fp16>(static_cast<uint16_t>(both)) * static_cast<float>(sub & 0xff),
            -from_half<Fp16>(static_cast<uint16_t>(both >> 16)) * static_cast<float>(sub >> 8)};
  }
  const uint32_t both = load(reinterpret_cast<const uint32_t*>(scales) + group);
  const float d = from_half<Fp16>(static_cast<uint16_t>(both));
  const float second = from_half<Fp16>(static_cast<uint16_t>(both >> 16));
  return {d, p.kind == Scales::half_zero ? -(d * second) : second};
}

}  // namespace fastllm::cuda
