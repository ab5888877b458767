// Products with quantized weights, one set of compiled tiles for all formats. A strip of a few
// panels is unpacked to a canonical form that all formats share, and met by rows of x in their
// prepared form, a stretch of columns at a time; fp32 sums stay in memory between stretches. One row
// and a thousand take the same steps in the same order, so they have the same bits.
//
// Everything is chosen at run time by a table entry: its users are compiled once for all formats.
#pragma once
#include "cpu/matmul_tasks.h"

namespace fastllm::FASTLLM_ISA {

// Few rows unpack so many columns at a time, which stay in the L1 cache.
constexpr int64_t kFewStretch = 256;
constexpr int kMaxStrip = 4;  // panels of a strip

// Tiles: rows x panels. Up to kFewRows rows are one group and read strips of as many panels as
// their tile has; more rows are groups that meet strips of kWideStrip. Float tiles that scale every
// kShortChunk columns or fewer have 7 rows: the sums of a chunk and those of all chunks fill the
// registers, and 14 chains cover the latency of a dot (6 cycles) at two a cycle. With 12 rows the end
// of a chunk loads and stores 24 fp32 sums: on Zen 4 75 cycles beside 384 of dots, where its FMAs
// need 24. 24 chains are for chunks of 128. An int8 tile of 6 rows keeps both sums in registers too:
// 512 x 2048 x 2048 takes 7.6 ms of q8_0 with 12 rows, not 6.8 (Zen 5).
#if defined(__AVX512F__)
constexpr int kFewRows = 8, kWideRows = 12, kShortRows = 7, kWideInt8Rows = 6, kWideStrip = 2;
#elif defined(__AVX2__)
constexpr int kFewRows = 4, kWideRows = 6, kShortRows = 6, kWideInt8Rows = 6, kWideStrip = 1;
#else
constexpr int kFewRows = 2, kWideRows = 2, kShortRows = 2, kWideInt8Rows = 2, kWideStrip = 1;
#endif
constexpr int64_t kShortChunk = 64;

// What the canonical form and the prepared rows hold beside codes.
enum class Sums : uint8_t {
  plain,    // acc += d * sum
  minimum,  // and += m * (sum of x)
  scaled,   // acc += (d * dx) * sum: x is e4m3 codes times dx
  halves,   // int8: sum = f0 * sum of 16 columns + f1 * sum of the other 16
};

// A strip's segment in canonical form, its panels side by side: words of 4 bytes a row (4 int8, 2
// bf16, 1 float), and for each chunk and panel 3 vectors of 16 floats or int32. (A panel behind the
// other would put their words 4 KB apart, into one set of the cache.)
struct Segment {
  const uint8_t* codes;
  const float* scales;
  int64_t columns, chunk;
  Sums sums;
  bool first;  // of a row: sums begin with zeros
};
constexpr int64_t kScaleVectors = 3;
constexpr int64_t kPanelScales = kScaleVectors * kPanelRows;  // floats of a chunk and panel

// sums[MR][NP * 16] += (of a first segment: =) rows of x, prepared and `width` interleaved, times a
// segment.
using SegmentTile = void(const Segment&, const char* x, int64_t width, float* sums);

// One panel of a packed weight.
struct Panel {
  const uint8_t *codes, *scales;
};

struct QuantKernel;
// sums[MR][16] = rows of x, prepared and `width` interleaved, times a whole panel.
using FewTile = void(const QuantKernel&, const Panel&, const char* x, int64_t width, float* sums);

struct QuantKernel {
  int64_t k, chunk;
  Sums sums;
  Format format;
  int shift;                                      // log2 of the columns under one scale
  int word_columns;                               // of the canonical form: 4, 2 or 1
  int words_per_block;                            // of the packed form
  int32_t offset;                                 // int8: what makes codes unsigned
  float factor;                                   // of d
  int64_t panel_codes, panel_scales;              // bytes of a packed panel
  int64_t codes_ahead, scales_ahead, scale_step;  // what few-row tiles prefetch; step: of a block

  // Columns of one panel of a strip of `panels`.
  void (*unpack_codes)(const uint8_t* from, int64_t columns, int64_t ahead, int panels,
                       uint8_t* to);
  void (*unpack_scales)(const QuantKernel&, const uint8_t* from, int64_t column, int64_t columns,
                        int panels, float* to);
  // One row of x of k columns to its prepared form, words `width` apart; x null: zeros.
  void (*prepare_row)(const QuantKernel&, const void* x, DType type, char* to, int64_t width);
  // The same for `live` rows of bf16, `stride` elements apart, of a group of at most kWideRows; or
  // null.
  void (*prepare_group)(const QuantKernel&, const uint16_t* x, int64_t stride, int64_t live,
                        char* to, int64_t width);
  SegmentTile* const* tiles;  // by shape
  FewTile* const* few;        // of 1, 2, 4, 8 rows; null: few rows take strips too

  int wide_rows() const {
    return word_columns == 4 ? kWideInt8Rows : chunk <= kShortChunk ? kShortRows : kWideRows;
  }
  bool valid() const { return unpack_codes != nullptr; }
  int64_t column_codes() const { return words_per_block * 4 * kPanelRows / kBlock; }  // of a panel
  // Bytes of a prepared row, and where its columns from `column` on begin (times `width`).
  int64_t row_bytes() const { return row_offset(k) + (k % chunk ? 4 : 0); }
  int64_t row_offset(int64_t column) const {
    if (word_columns == 4) return column / kBlock * (sums == Sums::halves ? 44 : 40);
    return (column / word_columns + column / chunk) * 4;
  }
};

// The kernel of a quantized format and mode for rows of k columns; modes that this level has no
// products for are computed in fp32.
QuantKernel quant_kernel(Format format, Activation mode, int64_t k);

// The rows and panels of the tile for up to kFewRows rows, which are one group.
struct TileShape {
  int rows, panels;
};
TileShape few_tile(int64_t rows);

// The rows of the few-row tile for so many, and sums[rows][16] = rows of x (of a group of `width`, at
// least few_width(rows)) times a panel. Only of kernels with few-row tiles.
int few_width(int64_t rows);
void multiply_few(const QuantKernel& kernel, const Panel& panel, int64_t rows, const char* x,
                  int64_t width, float* sums);

// A strip of up to kMaxStrip panels; those without codes are none.
struct StripPanels {
  Panel panels[kMaxStrip];
  int count;
};

// What is done at a time where strips are unpacked before rows meet them (quant_strips.h); chosen by
// shape alone.
struct StripPlan {
  int64_t stretch;              // columns that are unpacked, and that a tile takes, at once
  int64_t scales_at, unpacked;  // bytes of a stretch of one strip: codes; codes and scales
};
// For strips of `panels` panels, `strips` of them side by side. few: the rows are one group of a
// few_tile.
StripPlan strip_plan(const QuantKernel& kernel, int panels, int strips, bool few);

// The tile for so many rows of a group.
SegmentTile* segment_tile(const QuantKernel& kernel, int64_t rows, bool few);

// Columns [column, column + columns) of a strip in canonical form: codes, and scales behind them.
// `ahead` (or null) is a strip that begins where this one does, of which column `later` and what
// follows will be unpacked soon: as many columns are prefetched.
void unpack_strip(const QuantKernel& kernel, const StripPanels& strip, int64_t column,
                  int64_t columns, uint8_t* codes, float* scales, const StripPanels* ahead,
                  int64_t later);

}  // namespace fastllm::FASTLLM_ISA
