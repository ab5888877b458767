// int8 codes to pairs of bf16 or fp16, exactly.
#pragma once
#include "cuda/ptx.cuh"

namespace fastllm::cuda {

// Codes of the bytes that the selector names (0x4j4i: i in the low half) as a pair of floats.
template <class T>
__device__ __forceinline__ uint32_t codes_to_pair(uint32_t codes, uint32_t selector);
template <>
__device__ __forceinline__ uint32_t codes_to_pair<Fp16>(uint32_t codes, uint32_t selector) {
  // 0x6400 | u is 1024 + u; u = code + 128; 0x6480 is 1152.
  return subtract_pairs<Fp16>(select_bytes(codes ^ 0x80808080u, 0x64646464u, selector),
                              0x64806480u);
}
template <>
__device__ __forceinline__ uint32_t codes_to_pair<Bf16>(uint32_t codes, uint32_t selector) {
  // 0x4300 | low 7 bits is 128 + low; minus 128 (0x4300), or 256 (0x4380) where the sign is set.
  const uint32_t x = select_bytes(codes, 0x43434343u, selector);
  return subtract_pairs<Bf16>(x & 0xff7fff7fu, x & 0xff80ff80u);
}

}  // namespace fastllm::cuda
