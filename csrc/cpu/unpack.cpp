// The inverse of pack: panels of 16 interleaved rows as rows that are packed one by one (R = 1), or as
// the blocks of a GGUF file. One pass, no temporary.
#include "cpu/file_blocks.h"
#include "cpu/integers.h"
#include "cpu/scale_parts.h"
#include "cpu/unpack_panel.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class T>
FASTLLM_INLINE void separate(const uint8_t* from, int64_t rows, int64_t count, uint8_t* to,
                             int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < count; ++i)
      __builtin_memcpy(to + r * stride + i * sizeof(T), from + (i * kPanelRows + r) * sizeof(T),
                       sizeof(T));
}
FASTLLM_INLINE void separate_scales(const ScaleParts& s, int64_t repeats, const uint8_t* from,
                                    int64_t rows, uint8_t* to, int64_t stride) {
  for (int64_t i = 0; i < repeats; ++i, from += s.size() * kPanelRows, to += s.size()) {
    if (s.element == 2)
      separate<uint16_t>(from, rows, s.count, to, stride);
    else
      separate<uint32_t>(from, rows, s.count, to, stride);
    separate<uint8_t>(from + s.count * s.element * kPanelRows, rows, s.bytes,
                      to + s.count * s.element, stride);
  }
}

void unpack_rows(const UnpackArgs& a, int64_t g) {
  const int64_t count = smaller(kPanelRows, a.n - g * kPanelRows);
  const int64_t words = row_words(a.format, a.k), scale_bytes = row_scale_bytes(a.format, a.k);
  unpack_panel(static_cast<const char*>(a.data) + g * words * 4 * kPanelRows, words, count,
               static_cast<char*>(a.rows) + g * kPanelRows * 4 * words, 4 * words);
  if (!scale_bytes) return;
  const ScaleParts parts = scale_parts(a.format, a.k);
  separate_scales(parts, scale_bytes / parts.size(),
                  static_cast<const uint8_t*>(a.scales) + g * kPanelRows * scale_bytes, count,
                  static_cast<uint8_t*>(a.row_scales) + g * kPanelRows * scale_bytes, scale_bytes);
}

template <class Block>
void unpack_blocks(const UnpackArgs& a, int64_t g) {
  constexpr int64_t per_stretch = 256 / Block::columns, words = per_stretch * Block::words;
  const int64_t blocks = a.k / Block::columns, count = smaller(kPanelRows, a.n - g * kPanelRows);
  auto* rows = static_cast<uint8_t*>(a.rows) + g * kPanelRows * blocks * Block::bytes;
  const auto* panel =
      static_cast<const uint8_t*>(a.data) + g * blocks * Block::words * 4 * kPanelRows;
  const auto* scales =
      static_cast<const uint8_t*>(a.scales) + g * blocks * Block::scales * kPanelRows;
  constexpr bool records = Block::columns == 256;
  constexpr int64_t code_bytes = 4 * words, part_bytes = per_stretch * Block::scales;  // of a row
  alignas(64) uint8_t codes[kPanelRows * code_bytes], parts[kPanelRows * part_bytes];
  for (int64_t b = 0; b < blocks; b += per_stretch) {
    const int64_t n = smaller(per_stretch, blocks - b);
    unpack_panel(reinterpret_cast<const char*>(panel), n * Block::words, count,
                 reinterpret_cast<char*>(codes), code_bytes);
    const ScaleParts layout =
        records ? scale_parts(a.format, 256) : ScaleParts{2, n * Block::scales / 2, 0};
    separate_scales(layout, 1, scales, count, parts, part_bytes);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < n; ++i)
        Block::write(codes + r * code_bytes + 4 * i * Block::words,
                     parts + r * part_bytes + i * Block::scales,
                     rows + (r * blocks + b + i) * Block::bytes);
    panel += n * Block::words * 4 * kPanelRows;
    scales += n * Block::scales * kPanelRows;
  }
}

}  // namespace

void unpack(const UnpackArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, divide_up(a.n, kPanelRows), 1, &begin, &end);
  for (int64_t g = begin; g < end; ++g) {
    if (a.by_rows)
      unpack_rows(a, g);
    else
      with_file_block(a.format, [&](auto block) { unpack_blocks<decltype(block)>(a, g); });
  }
}

}  // namespace fastllm::FASTLLM_ISA
