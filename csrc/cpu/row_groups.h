// The left operand of a product whose tiles are those of linear: groups of kDenseRows rows, the
// words of all rows of a group side by side. Rows are packed where they lie, gathered ones too, by
// the thread that uses them.
#pragma once
#include <type_traits>

#include "cpu/matmul_dense.h"
#include "cpu/pack_panel.h"

namespace fastllm::FASTLLM_ISA {

// What a word of a panel holds: one of these, or two.
template <class D>
using Element = std::conditional_t<D::columns == 2, uint16_t, float>;

template <class D>
FASTLLM_INLINE int64_t words_of(int64_t k) {
  return (k + D::columns - 1) / D::columns;
}
template <class D>
FASTLLM_INLINE int64_t group_words(int64_t k) {
  return words_of<D>(k) * D::steps * kDenseRows;
}
// What storing the last column of a group may write past its end.
constexpr int64_t kGroupSlack = 16;

// One group, k columns: row(i) points to row i, or is null: a row of zeros.
template <class D, class Row>
static void pack_row_group(const Row& row, int64_t k, uint32_t* to) {
  constexpr int R = kDenseRows;
  int64_t done = 0;
#if defined(__AVX512F__)
  if constexpr (D::steps == 1) {
    // The 16 words stored of each column reach into the next one, which is stored after it.
    constexpr int64_t per_word = D::columns, step = 16 * per_word;
    const Element<D>* rows[R];
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) rows[i] = row(i);
    for (; done + step <= k; done += step) {
      vi r[16] = {};
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i)
        if (rows[i]) r[i] = vloadi(rows[i] + done);
      transpose_16x16(r);
      uint32_t* out = to + done / per_word * R;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) __builtin_memcpy(out + i * R, &r[i], 64);
    }
  }
#endif
  uint32_t* out = to + done / D::columns * D::steps * R;
  for (int i = 0; i < R; ++i) {
    if (const Element<D>* from = row(i))
      prepare_dense<D>(from + done, k - done, out + i, R);
    else
      for (int64_t w = 0; w < words_of<D>(k - done) * D::steps; ++w) out[w * R + i] = 0;
  }
}

// The same from columns: column(c) points to the element of the group's first row in column c.
// `live` rows exist; `wide`: 16 elements can be read at every column.
template <class D, class Column>
static void pack_column_group(const Column& column, int64_t live, bool wide, int64_t k,
                              uint32_t* to) {
  constexpr int R = kDenseRows;
  for (int64_t c = 0; c < k; c += D::columns, to += R * D::steps) {
    const Element<D>* low = column(c);
    const bool pair = D::columns == 2 && c + 1 < k;
    const Element<D>* high = pair ? column(c + 1) : low;
    if constexpr (VL == 16 && D::steps == 1) {
      if (wide && (D::columns == 1 || pair)) {
        vi word;
        if constexpr (D::columns == 2)
          word = vload_u16(low) | vload_u16(high) << 16;
        else
          word = vloadi(low);
        __builtin_memcpy(to, &word, 64);
        continue;
      }
    }
    for (int64_t i = 0; i < R; ++i) {
      if constexpr (D::columns == 1) {
        to[i] = i < live ? word_of(low[i]) : 0;
      } else {
        const uint32_t first = i < live ? low[i] : 0;
        const uint32_t second = i < live && pair ? high[i] : 0;
        if constexpr (D::steps == 1) {
          to[i] = first | second << 16;
        } else {
          to[i] = first << 16;
          to[R + i] = second << 16;
        }
      }
    }
  }
}

// One word for each of 16 columns.
FASTLLM_INLINE void pack_words(const float* low, const float*, uint32_t* out) {
  __builtin_memcpy(out, low, kPanelRows * 4);
}
FASTLLM_INLINE void pack_words(const uint16_t* low, const uint16_t* high, uint32_t* out) {
  for (int i = 0; i < kPanelRows; ++i) out[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
}

// `panels` panels (1, or 2 side by side) of a right operand that lies in rows: row(c) points to the
// strip's first column in row c, `count` columns exist. Panels lie `words` words of 16 apart.
template <class D, class Row>
static void pack_row_strip(const Row& row, int64_t count, int panels, int64_t k, uint32_t* to) {
  const int64_t words = words_of<D>(k), size = words * kPanelRows;
  int64_t c = 0;
#if defined(__AVX512F__)
  if (D::columns == 2 && panels == 2 && count >= 2 * kPanelRows) {
    // Rows c and c + 1 zipped: columns 0 to 15 are the words of the first panel.
    alignas(64) static constexpr uint16_t zip[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i first = _mm512_load_si512(zip), second = _mm512_load_si512(zip + 32);
    for (; c + 2 <= k; c += 2) {
      const __m512i low = (__m512i)vloadi(row(c)), high = (__m512i)vloadi(row(c + 1));
      uint32_t* out = to + c / 2 * kPanelRows;
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(low, first, high));
      _mm512_storeu_si512(out + size, _mm512_permutex2var_epi16(low, second, high));
    }
  }
#endif
  for (int p = 0; p < panels; ++p) {
    const int64_t left = count - p * kPanelRows, live = left < kPanelRows ? left : kPanelRows;
    for (int64_t r = c; r < k; r += D::columns) {
      uint32_t* out = to + p * size + r / D::columns * kPanelRows;
      const Element<D>* low = row(r) + p * kPanelRows;
      const Element<D>* high = D::columns == 2 && r + 1 < k ? row(r + 1) + p * kPanelRows : nullptr;
      if (live == kPanelRows && (D::columns == 1 || high)) {
        pack_words(low, high, out);
        continue;
      }
      for (int64_t i = 0; i < kPanelRows; ++i) {
        if constexpr (D::columns == 1) {
          out[i] = i < live ? word_of(low[i]) : 0;
        } else {
          out[i] = i < live ? low[i] : 0;
          if (i < live && high) out[i] |= static_cast<uint32_t>(high[i]) << 16;
        }
      }
    }
  }
}

// A group of `live` rows times NP panels, in the smallest tile that holds the rows; sums are
// [kDenseRows][NP * 16]. A row's sums do not depend on the tile.
template <class D, int NP>
static void group_times_strip(const uint32_t* panels, int64_t words, const uint32_t* group,
                              int64_t live, float* sums) {
  constexpr int R = kDenseRows;
  if constexpr (R >= 6)
    if (live <= 4) {
      if (live == 1) return dense_tile<D, 1, NP>(panels, words, 0, group, R, sums);
      if (live == 2) return dense_tile<D, 2, NP>(panels, words, 0, group, R, sums);
      return dense_tile<D, 4, NP>(panels, words, 0, group, R, sums);
    }
  if constexpr (R >= 12)
    if (live <= 6) return dense_tile<D, 6, NP>(panels, words, 0, group, R, sums);
  dense_tile<D, R, NP>(panels, words, 0, group, R, sums);
}

// `rows` packed rows times the panels [panel, last) of a right operand with n columns and `words`
// words a column. pack(panel, count) brings `count` panels into `panels`; done(row, live, column,
// columns, sums, stride) gets every tile. A strip of panels meets all rows while it is in the L1
// cache.
template <class D, class Pack, class Done>
static void rows_times_strips(const uint32_t* groups, int64_t rows, int64_t words, int64_t n,
                              int64_t panel, int64_t last, const uint32_t* panels, const Pack& pack,
                              const Done& done) {
  constexpr int R = kDenseRows, S = kDenseStrip;
  alignas(64) float sums[R * S * kPanelRows];
  const int64_t size = words * D::steps * R;
  while (panel < last) {
    const int count = panel + S <= last ? S : 1;
    pack(panel, count);
    const int64_t column = panel * kPanelRows, stride = count * kPanelRows;
    const int64_t columns = n - column < stride ? n - column : stride;
    for (int64_t row = 0; row < rows; row += R) {
      const int64_t live = rows - row < R ? rows - row : R;
      const uint32_t* group = groups + row / R * size;
      if (count == S)
        group_times_strip<D, S>(panels, words, group, live, sums);
      else
        group_times_strip<D, 1>(panels, words, group, live, sums);
      done(row, live, column, columns, sums, stride);
    }
    panel += count;
  }
}

}  // namespace fastllm::FASTLLM_ISA
