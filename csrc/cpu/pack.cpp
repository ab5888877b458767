// Brings a weight into panels of 16 interleaved rows, straight from a file's blocks: one pass, no
// temporary.
#include <type_traits>

#include "cpu/integers.h"
#include "cpu/pack_panel.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// GGUF blocks are the scales (fp16 d, and m for q4_1) followed by the codes, already in groups of 4
// bytes.
template <class F>
void pack_blocks(const PackArgs& a, int64_t g) {
  constexpr int head = 2 * F::scales, size = head + 4 * F::words;
  const int64_t blocks = a.k / kBlock;
  const uint8_t* rows = static_cast<const uint8_t*>(a.rows);
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* data = static_cast<uint8_t*>(a.data) + (g * blocks + b) * block_bytes<F>;
    uint16_t* scales = a.scales + (g * blocks + b) * block_scales<F>;
    for (int r = 0; r < kPanelRows; ++r) {
      const int64_t row = g * kPanelRows + r;
      uint8_t block[size] = {};
      if (row < a.n) __builtin_memcpy(block, rows + row * a.row_stride + b * size, size);
      for (int s = 0; s < F::scales; ++s)
        __builtin_memcpy(scales + s * kPanelRows + r, block + 2 * s, 2);
      for (int i = 0; i < F::words; ++i)
        __builtin_memcpy(data + (i * kPanelRows + r) * 4, block + head + 4 * i, 4);
    }
  }
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
  const int64_t panels = (a.n + kPanelRows - 1) / kPanelRows;
  int64_t begin, end;
  my_share(team, panels, 1, &begin, &end);
  for (int64_t g = begin; g < end; ++g) switch (a.format) {
      case Format::q4_0: pack_blocks<Q4_0>(a, g); break;
      case Format::q4_1: pack_blocks<Q4_1>(a, g); break;
      case Format::q8_0: pack_blocks<Q8_0>(a, g); break;
      case Format::bf16:
        with_source(a.rows_type, [&](auto* from) { pack_dense_panel<uint16_t>(a, g, from); });
        break;
      default: with_source(a.rows_type, [&](auto* from) { pack_dense_panel<float>(a, g, from); });
    }
}

}  // namespace fastllm::FASTLLM_ISA
