// The inverse of pack_panel.h: the rows of a panel, word by word.
#pragma once
#include "cpu/packed.h"
#include "cpu/transpose.h"

namespace fastllm::FASTLLM_ISA {

// `words` words of the first `count` rows of a panel; rows lie `stride` bytes apart. (Nothing is
// inferred from the callers' sizes: GCC 12 follows them into loops that do not run.)
[[maybe_unused]] static __attribute__((noipa)) void unpack_panel(const char* panel, int64_t words,
                                                                 int64_t count, char* rows,
                                                                 int64_t stride) {
  constexpr int64_t kWordBytes = 4 * kPanelRows;
  int64_t w = 0;
#if defined(__AVX512F__)
  for (; w < words; w += 16) {
    const int64_t left = words - w < 16 ? words - w : 16;
    vi r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = i < left ? vloadi(panel + (w + i) * kWordBytes) : vi{};
    transpose_16x16(r);
    const __mmask16 some = static_cast<__mmask16>((1u << left) - 1);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < count) _mm512_mask_storeu_epi32(rows + i * stride + 4 * w, some, (__m512i)r[i]);
  }
#else
  for (; w + 4 <= words; w += 4)
    for (int64_t i = 0; i < count; i += 4) {
      const char* from = panel + w * kWordBytes + 4 * i;
      const auto column = [&](int64_t j) __attribute__((always_inline)) {
        return _mm_loadu_ps(reinterpret_cast<const float*>(from + j * kWordBytes));
      };
      __m128 r[4] = {column(0), column(1), column(2), column(3)};
      _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
      for (int64_t j = 0; j < 4 && i + j < count; ++j)
        __builtin_memcpy(rows + (i + j) * stride + 4 * w, &r[j], 16);
    }
  for (; w < words; ++w)
    for (int64_t i = 0; i < count; ++i)
      __builtin_memcpy(rows + i * stride + 4 * w, panel + w * kWordBytes + 4 * i, 4);
#endif
}

}  // namespace fastllm::FASTLLM_ISA
