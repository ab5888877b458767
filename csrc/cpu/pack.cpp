// Brings a weight into panels of 16 interleaved rows, straight from a file's blocks, from dense
// values or from rows that are packed one by one (R = 1): one pass, no temporary.
#include <type_traits>

#include "cpu/file_blocks.h"
#include "cpu/integers.h"
#include "cpu/pack_panel.h"
#include "cpu/scale_parts.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// A panel's scales from rows of `from`, `stride` bytes apart; those of rows that do not exist are 0.
template <class T>
FASTLLM_INLINE void interleave(const uint8_t* from, int64_t stride, int64_t rows, int64_t count,
                               uint8_t* to) {
  for (int64_t r = 0; r < kPanelRows; ++r)
    for (int64_t i = 0; i < count; ++i) {
      T value{};
      if (r < rows) __builtin_memcpy(&value, from + r * stride + i * sizeof(T), sizeof(T));
      __builtin_memcpy(to + (i * kPanelRows + r) * sizeof(T), &value, sizeof(T));
    }
}
FASTLLM_INLINE void interleave_scales(const ScaleParts& s, int64_t repeats, const uint8_t* from,
                                      int64_t stride, int64_t rows, uint8_t* to) {
  for (int64_t i = 0; i < repeats; ++i, from += s.size(), to += s.size() * kPanelRows) {
    if (s.element == 2)
      interleave<uint16_t>(from, stride, rows, s.count, to);
    else
      interleave<uint32_t>(from, stride, rows, s.count, to);
    interleave<uint8_t>(from + s.count * s.element, stride, rows, s.bytes,
                        to + s.count * s.element * kPanelRows);
  }
}

// Nothing is inferred from the callers' sizes: GCC 12 follows them into loops that do not run, and
// warns of what these would do.
__attribute__((noipa)) void pack_words(const char* rows, int64_t stride, int64_t count,
                                       int64_t words, uint32_t* panel) {
  pack_panel(rows, stride, count, 4 * words, words, panel);
}

// A panel from blocks of a file, 256 columns at a time: rows of words stay in the L1 cache on their
// way.
template <class Block>
void pack_blocks(const PackArgs& a, int64_t g) {
  constexpr int64_t per_stretch = 256 / Block::columns, words = per_stretch * Block::words;
  const int64_t blocks = a.k / Block::columns, count = smaller(kPanelRows, a.n - g * kPanelRows);
  const auto* rows = static_cast<const uint8_t*>(a.rows) + g * kPanelRows * a.row_stride;
  auto* panel = static_cast<uint8_t*>(a.data) + g * blocks * Block::words * 4 * kPanelRows;
  auto* scales = static_cast<uint8_t*>(a.scales) + g * blocks * Block::scales * kPanelRows;
  constexpr bool records = Block::columns == 256;
  constexpr int64_t code_bytes = 4 * words, part_bytes = per_stretch * Block::scales;  // of a row
  alignas(64) uint8_t codes[kPanelRows * code_bytes], parts[kPanelRows * part_bytes];
  for (int64_t b = 0; b < blocks; b += per_stretch) {
    const int64_t n = smaller(per_stretch, blocks - b);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < n; ++i)
        Block::read(rows + r * a.row_stride + (b + i) * Block::bytes,
                    codes + r * code_bytes + 4 * i * Block::words,
                    parts + r * part_bytes + i * Block::scales);
    pack_words(reinterpret_cast<const char*>(codes), code_bytes, count, n * Block::words,
               reinterpret_cast<uint32_t*>(panel));
    const ScaleParts layout =
        records ? scale_parts(a.format, 256) : ScaleParts{2, n * Block::scales / 2, 0};
    interleave_scales(layout, 1, parts, part_bytes, count, scales);
    panel += n * Block::words * 4 * kPanelRows;
    scales += n * Block::scales * kPanelRows;
  }
}

// A panel from rows that are packed one by one.
void pack_rows(const PackArgs& a, int64_t g) {
  const int64_t count = smaller(kPanelRows, a.n - g * kPanelRows);
  const int64_t words = row_words(a.format, a.k), scale_bytes = row_scale_bytes(a.format, a.k);
  const char* rows = static_cast<const char*>(a.rows) + g * kPanelRows * 4 * words;
  pack_words(rows, 4 * words, count, words,
             static_cast<uint32_t*>(a.data) + g * words * kPanelRows);
  if (!scale_bytes) return;
  const ScaleParts parts = scale_parts(a.format, a.k);
  interleave_scales(parts, scale_bytes / parts.size(),
                    static_cast<const uint8_t*>(a.row_scales) + g * kPanelRows * scale_bytes,
                    scale_bytes, count,
                    static_cast<uint8_t*>(a.scales) + g * kPanelRows * scale_bytes);
}

// Calls body with a null pointer to the element type of the rows.
template <class Body>
FASTLLM_INLINE void with_source(DType type, Body body) {
  if (type == DType::f32)
    body(static_cast<const float*>(nullptr));
  else if (type == DType::bf16)
    body(static_cast<const uint16_t*>(nullptr));
  else
    body(static_cast<const Half*>(nullptr));
}

template <class To, class From>
FASTLLM_INLINE void convert_row(To* to, const From* from, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
}

// A panel of dense rows. Those of another type are converted a stretch of columns at a time, which
// stays in the L1 cache on its way.
template <class To, class From>
void pack_dense_panel(const PackArgs& a, int64_t g, const From*) {
  constexpr int64_t kPerWord = 4 / sizeof(To), kStretch = 256;
  const From* rows = static_cast<const From*>(a.rows) + g * kPanelRows * a.row_stride;
  const int64_t count = smaller(kPanelRows, a.n - g * kPanelRows);
  const int64_t words = divide_up(a.k, kPerWord);
  uint32_t* panel = static_cast<uint32_t*>(a.data) + g * words * kPanelRows;
  if constexpr (std::is_same_v<To, From>) {
    pack_panel(reinterpret_cast<const char*>(rows), a.row_stride * sizeof(To), count,
               a.k * sizeof(To), words, panel);
  } else {
    alignas(64) To copy[kPanelRows * kStretch];
    for (int64_t c = 0; c < a.k; c += kStretch) {
      const int64_t n = smaller(kStretch, a.k - c);
      for (int64_t r = 0; r < count; ++r)
        convert_row(copy + r * kStretch, rows + r * a.row_stride + c, n);
      pack_panel(reinterpret_cast<const char*>(copy), kStretch * sizeof(To), count, n * sizeof(To),
                 divide_up(n, kPerWord), panel + c / kPerWord * kPanelRows);
    }
  }
}

}  // namespace

void pack(const PackArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, divide_up(a.n, kPanelRows), 1, &begin, &end);
  for (int64_t g = begin; g < end; ++g) {
    if (a.by_rows)
      pack_rows(a, g);
    else if (a.format == Format::bf16)
      with_source(a.rows_type, [&](auto* from) { pack_dense_panel<uint16_t>(a, g, from); });
    else if (a.format == Format::f32)
      with_source(a.rows_type, [&](auto* from) { pack_dense_panel<float>(a, g, from); });
    else
      with_file_block(a.format, [&](auto block) { pack_blocks<decltype(block)>(a, g); });
  }
}

}  // namespace fastllm::FASTLLM_ISA
