// Small arithmetic on sizes; kernels use no algorithms of the standard library.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {
namespace {

FASTLLM_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTLLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTLLM_INLINE int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return smaller(larger(x, low), high);
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
