// Where the quantizer's codes and scales of a panel of 16 rows go (see
// fastllm/ops/packed_layout.py). Lanes of rows that the weight does not have are stored as zero bytes.
#pragma once
#include "cpu/packed.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// A panel: what has become of its rows. VL rows at a time are kernels' vectors, the v-th of NV.
struct PanelOut {
  uint8_t* data;    // of the panel
  uint8_t* scales;  // the same
  vi live[NV];      // -1 in lanes of rows that exist
  vi overflow[NV];  // -1 where a scale does not fit fp16

  // The halves of 16 lanes at byte `at` of the scales.
  void half(int64_t at, int v, vf x) {
    const vi bits = vround_f16_bits(x);
    overflow[v] |= live[v] & ((bits & 0x7c00) == 0x7c00);
    vstore_u16(scales + at + 2 * v * VL, bits & live[v]);
  }
  void single(int64_t at, int v, vf x) {
    vstore(reinterpret_cast<float*>(scales + at) + v * VL, vbits(vbits(x) & live[v]));
  }
  // The low bytes of lanes that hold integers.
  void byte(int64_t at, int v, vf x) {
    const vi all = __builtin_convertvector(x, vi) & live[v];
    for (int i = 0; i < VL; ++i) scales[at + v * VL + i] = static_cast<uint8_t>(all[i]);
  }
};

// Codes of 32 columns of VL rows into the words of their block. codes: [32][VL] integers, whose low
// `WORDS` bits count.
template <int WORDS>
FASTLLM_INLINE void store_codes(const vi* codes, vi live, uint8_t* block, int v) {
  const auto word = [&](int i, vi bits) __attribute__((always_inline)) {
    bits &= live;
    __builtin_memcpy(block + (i * kPanelRows + v * VL) * 4, &bits, sizeof bits);
  };
  if constexpr (WORDS == 8) {
    for (int i = 0; i < 8; ++i) {
      vi bits{};
      for (int j = 0; j < 4; ++j) bits |= (codes[4 * i + j] & 0xff) << (8 * j);
      word(i, bits);
    }
    return;
  }
  for (int i = 0; i < 4; ++i) {
    vi bits{};
    for (int j = 0; j < 4; ++j)
      bits |= ((codes[4 * i + j] & 15) | (codes[16 + 4 * i + j] & 15) << 4) << (8 * j);
    word(i, bits);
  }
  if constexpr (WORDS == 5) {
    vi bits{};
    for (int c = 0; c < 32; ++c) bits |= (codes[c] >> 4 & 1) << (c / 4 + c % 4 * 8);
    word(4, bits);
  }
  if constexpr (WORDS == 6)
    for (int h = 0; h < 2; ++h) {
      vi bits{};
      for (int c = 0; c < 16; ++c) bits |= (codes[16 * h + c] >> 4 & 3) << (c / 4 * 2 + c % 4 * 8);
      word(4 + h, bits);
    }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
