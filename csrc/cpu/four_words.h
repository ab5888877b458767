// Four words of packed codes of one row: 16 columns, a byte each.
#pragma once
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {
namespace {

typedef uint32_t v4 __attribute__((vector_size(16)));

FASTLLM_INLINE v4 load_words(const uint8_t* p) {
  v4 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTLLM_INLINE void store_words(uint8_t* p, v4 v) { __builtin_memcpy(p, &v, sizeof v); }
FASTLLM_INLINE uint32_t load_word(const uint8_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}
FASTLLM_INLINE void store_word(uint8_t* p, uint32_t word) {
  __builtin_memcpy(p, &word, sizeof word);
}
FASTLLM_INLINE uint32_t or_words(v4 v) { return (v[0] | v[1]) | (v[2] | v[3]); }

constexpr v4 kIndex = {0, 1, 2, 3};
constexpr v4 kLow = {0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f};

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
