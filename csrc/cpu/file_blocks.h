// The blocks of GGUF files and the packed layout of one row (R = 1 of fastllm/ops/packed_layout.py):
// words of codes, and scales. Exact both ways; a few instructions for 16 columns, so that reading a
// file is bound by memory.
#pragma once
#include "common/formats.h"
#include "cpu/four_words.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Bit 4 n + j becomes bit 8 j + n: the high bits of 32 columns as a file holds them, as a word.
FASTLLM_INLINE uint32_t transposed_bits(uint32_t bits) {
  v4 t = ((bits - v4{}) >> kIndex) & 0x11111111;
  t = (t | t >> 3) & 0x03030303;
  t = (t | t >> 6) & 0x000f000f;
  t = (t | t >> 12) & 0xff;
  return or_words(t << (8 * kIndex));
}
FASTLLM_INLINE uint32_t file_bits(uint32_t word) {
  v4 t = ((word - v4{}) >> (8 * kIndex)) & 0xff;
  t = (t | t << 12) & 0x000f000f;
  t = (t | t << 6) & 0x03030303;
  t = (t | t << 3) & 0x11111111;
  return or_words(t << kIndex);
}

// Formats of 32 columns: HEAD bytes of scales, 4 bytes of high bits where there are five, codes.
template <int HEAD, int WORDS>
struct SmallBlock {
  static constexpr bool five = WORDS == 5;
  static constexpr int columns = 32, bytes = HEAD + 4 * WORDS, words = WORDS, scales = HEAD;
  static constexpr int codes = five ? 16 : 4 * WORDS;

  FASTLLM_INLINE void read(const uint8_t* block, uint8_t* words_to, uint8_t* scales_to) {
    __builtin_memcpy(scales_to, block, HEAD);
    __builtin_memcpy(words_to, block + bytes - codes, codes);
    if constexpr (five) store_word(words_to + 16, transposed_bits(load_word(block + HEAD)));
  }
  FASTLLM_INLINE void write(const uint8_t* words_from, const uint8_t* scales_from, uint8_t* block) {
    __builtin_memcpy(block, scales_from, HEAD);
    __builtin_memcpy(block + bytes - codes, words_from, codes);
    if constexpr (five) store_word(block + HEAD, file_bits(load_word(words_from + 16)));
  }
};

// q4_k and q5_k: d, dmin, 12 bytes of eight scales and minimums of 6 bits, 32 bytes of high bits
// (bit i of byte j is column 32 i + j), and bytes of which each holds columns c and c + 32.
template <int WORDS>
struct SuperBlock {
  static constexpr bool five = WORDS == 5;
  static constexpr int columns = 256, bytes = five ? 176 : 144, words = 8 * WORDS, scales = 20;
  static constexpr int block = 4 * WORDS;  // bytes of 32 columns

  FASTLLM_INLINE void read(const uint8_t* from, uint8_t* to, uint8_t* scales_to) {
    __builtin_memcpy(scales_to, from, 4);
    const uint32_t a = load_word(from + 4), b = load_word(from + 8), c = load_word(from + 12);
    const uint32_t parts[4] = {a & 0x3f3f3f3f, b & 0x3f3f3f3f,
                               (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030),
                               (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)};
    for (int s = 0; s < 8; ++s)
      for (int side = 0; side < 2; ++side)
        scales_to[4 + 2 * s + side] =
            static_cast<uint8_t>(parts[s / 4 * 2 + side] >> (8 * (s % 4)));
    for (int i = 0; i < 4; ++i, to += 2 * block) {
      const uint8_t* codes = from + bytes - 128 + 32 * i;
      const v4 x = load_words(codes), y = load_words(codes + 16);
      store_words(to, (x & kLow) | (y & kLow) << 4);
      store_words(to + block, (x >> 4 & kLow) | (y & ~kLow));
      if constexpr (five) {
        store_word(to + 16, high_word(from + 16, 2 * i));
        store_word(to + block + 16, high_word(from + 16, 2 * i + 1));
      }
    }
  }
  FASTLLM_INLINE void write(const uint8_t* from, const uint8_t* scales_from, uint8_t* to) {
    __builtin_memcpy(to, scales_from, 4);
    uint32_t parts[4] = {};
    for (int s = 0; s < 8; ++s)
      for (int side = 0; side < 2; ++side)
        parts[s / 4 * 2 + side] |= static_cast<uint32_t>(scales_from[4 + 2 * s + side])
                                   << (8 * (s % 4));
    store_word(to + 4, (parts[0] & 0x3f3f3f3f) | (parts[2] & 0x30303030) << 2);
    store_word(to + 8, (parts[1] & 0x3f3f3f3f) | (parts[3] & 0x30303030) << 2);
    store_word(to + 12, (parts[2] & 0x0f0f0f0f) | (parts[3] & 0x0f0f0f0f) << 4);
    v4 first{}, second{};  // high bits of columns 0 to 15 and 16 to 31 of every 32
    for (int i = 0; i < 4; ++i, from += 2 * block) {
      uint8_t* codes = to + bytes - 128 + 32 * i;
      const v4 x = load_words(from), y = load_words(from + block);
      store_words(codes, (x & kLow) | (y & kLow) << 4);
      store_words(codes + 16, (x >> 4 & kLow) | (y & ~kLow));
      if constexpr (five)
        for (int s = 0; s < 2; ++s) {
          const v4 high = load_word(from + s * block + 16) - v4{};
          first |= (high >> kIndex & 0x01010101) << (2 * i + s);
          second |= (high >> (4 + kIndex) & 0x01010101) << (2 * i + s);
        }
    }
    if constexpr (five) {
      store_words(to + 16, first);
      store_words(to + 32, second);
    }
  }

 private:
  FASTLLM_INLINE uint32_t high_word(const uint8_t* bits, int plane) {
    const v4 x = load_words(bits) >> plane & 0x01010101;
    const v4 y = load_words(bits + 16) >> plane & 0x01010101;
    return or_words(x << kIndex | y << (4 + kIndex));
  }
};

// q6_k: two halves of 128 columns, 64 bytes of low nibbles each; then 32 bytes each of pairs of high
// bits (bits 2 i of byte j are of column 32 i + j), 16 scales, d.
struct SixBitBlock {
  static constexpr int columns = 256, bytes = 210, words = 48, scales = 18;

  FASTLLM_INLINE void read(const uint8_t* from, uint8_t* to, uint8_t* scales_to) {
    __builtin_memcpy(scales_to, from + 208, 2);
    __builtin_memcpy(scales_to + 2, from + 192, 16);
    for (int half = 0; half < 2; ++half, to += 96)
      for (int i = 0; i < 2; ++i) {
        const uint8_t *codes = from + 64 * half + 32 * i, *pairs = from + 128 + 32 * half;
        const v4 x = load_words(codes), y = load_words(codes + 16);
        uint8_t *low = to + 24 * i, *high = low + 48;
        store_words(low, (x & kLow) | (y & kLow) << 4);
        store_words(high, (x >> 4 & kLow) | (y & ~kLow));
        for (int side = 0; side < 2; ++side) {
          const v4 p = load_words(pairs + 16 * side);
          store_word(low + 16 + 4 * side, pair_word(p >> (2 * i)));
          store_word(high + 16 + 4 * side, pair_word(p >> (4 + 2 * i)));
        }
      }
  }
  FASTLLM_INLINE void write(const uint8_t* from, const uint8_t* scales_from, uint8_t* to) {
    __builtin_memcpy(to + 208, scales_from, 2);
    __builtin_memcpy(to + 192, scales_from + 2, 16);
    for (int half = 0; half < 2; ++half, from += 96) {
      v4 pairs[2] = {};
      for (int i = 0; i < 2; ++i) {
        uint8_t* codes = to + 64 * half + 32 * i;
        const uint8_t *low = from + 24 * i, *high = low + 48;
        const v4 x = load_words(low), y = load_words(high);
        store_words(codes, (x & kLow) | (y & kLow) << 4);
        store_words(codes + 16, (x >> 4 & kLow) | (y & ~kLow));
        for (int side = 0; side < 2; ++side)
          pairs[side] |= word_pairs(load_word(low + 16 + 4 * side)) << (2 * i) |
                         word_pairs(load_word(high + 16 + 4 * side)) << (4 + 2 * i);
      }
      store_words(to + 128 + 32 * half, pairs[0]);
      store_words(to + 144 + 32 * half, pairs[1]);
    }
  }

 private:
  FASTLLM_INLINE uint32_t pair_word(v4 p) { return or_words((p & 0x03030303) << (2 * kIndex)); }
  FASTLLM_INLINE v4 word_pairs(uint32_t word) { return (word - v4{}) >> (2 * kIndex) & 0x03030303; }
};

// Calls body with the blocks of a format; formats that GGUF files do not have: nothing.
template <class Body>
FASTLLM_INLINE void with_file_block(Format format, const Body& body) {
  switch (format) {
    case Format::q4_0: return body(SmallBlock<2, 4>{});
    case Format::q4_1: return body(SmallBlock<4, 4>{});
    case Format::q5_0: return body(SmallBlock<2, 5>{});
    case Format::q5_1: return body(SmallBlock<4, 5>{});
    case Format::q8_0: return body(SmallBlock<2, 8>{});
    case Format::q4_k: return body(SuperBlock<4>{});
    case Format::q5_k: return body(SuperBlock<5>{});
    case Format::q6_k: return body(SixBitBlock{});
    default: return;
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
