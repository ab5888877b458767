// The table of quantized products of one ISA level, how strips are unpacked and met by rows.
#include "cpu/quant_kernels.h"

#include "cpu/integers.h"
#include "cpu/quant_few.h"
#include "cpu/quant_rows.h"
#include "cpu/quant_tiles.h"
#include "cpu/quant_unpack.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// The tiles of one kind, one for each shape.
template <template <int, int> class Tile>
struct Tiles {
#if defined(__AVX512F__)
  static constexpr SegmentTile* all[] = {Tile<1, 4>::run, Tile<2, 4>::run, Tile<2, 2>::run,
                                         Tile<4, 4>::run, Tile<4, 2>::run, Tile<6, 2>::run,
                                         Tile<7, 2>::run, Tile<8, 2>::run, Tile<12, 2>::run};
#elif defined(__AVX2__)
  static constexpr SegmentTile* all[] = {Tile<1, 2>::run, Tile<2, 2>::run, Tile<4, 1>::run,
                                         Tile<6, 1>::run};
#else
  static constexpr SegmentTile* all[] = {Tile<1, 1>::run, Tile<2, 1>::run};
#endif
};
template <int MR, int NP>
struct FloatTile {
  static constexpr SegmentTile* run = float_tile<FloatDot, MR, NP>;
};
#if defined(__AVX512BF16__)
template <int MR, int NP>
struct PairTile {
  static constexpr SegmentTile* run = float_tile<PairDot, MR, NP>;
};
#endif
template <Sums KIND, bool SIGNED>
struct Int8Tiles {
  template <int MR, int NP>
  struct Tile {
    static constexpr SegmentTile* run = int8_segment_tile<KIND, SIGNED, MR, NP>;
  };
};

template <class F>
void choose_int8(QuantKernel& q) {
  using C = typename F::Codes;
  using S = typename F::Scales;
  constexpr Sums kind = S::integer_scales ? Sums::halves
                        : S::has_minimum  ? Sums::minimum
                                          : Sums::plain;
  q.sums = kind;
  q.chunk = kBlock;
  q.word_columns = Int8Words::columns;
  q.offset = int8_offset_of<C>();
  if (__is_same(C, NormalFloat)) q.factor = 1.f / 127;
  q.unpack_codes = unpack_codes<C, Int8Words>;
  q.prepare_row = prepare_int8<kind == Sums::halves>;
  q.few = FewTiles<F>::int8;
  q.tiles = Tiles<Int8Tiles<kind, C::is_signed && !kUnsignedDots>::template Tile>::all;
}

template <class F>
void choose_float(QuantKernel& q, Activation mode) {
  using C = typename F::Codes;
  const int64_t group = layout_of(q.format).group;
  q.sums = mode == Activation::fp8  ? Sums::scaled
           : F::Scales::has_minimum ? Sums::minimum
                                    : Sums::plain;
  q.chunk = group == 0 || group > 128 ? 128 : group;
#if defined(__AVX512BF16__)
  if (mode != Activation::fp32) {
    q.word_columns = PairWordsOf::columns;
    q.unpack_codes = unpack_codes<C, PairWordsOf>;
    q.prepare_row = prepare_words<2, C::paired_by_two>;
    if (q.sums != Sums::scaled) q.prepare_group = prepare_pairs<C::paired_by_two>;
    q.tiles = Tiles<PairTile>::all;
    q.few = FewPairTiles<F>::all;
    return;
  }
#endif
  q.word_columns = FloatWordsOf::columns;
  q.unpack_codes = unpack_codes<C, FloatWordsOf>;
  q.prepare_row = prepare_words<1, false>;
  q.tiles = Tiles<FloatTile>::all;
}

// Unpacked strips stay in the L2 cache (1 MB and more) beside rows of x.
constexpr int64_t kUnpackedBytes = 384 << 10;

void prefetch_scales(const QuantKernel& q, const uint8_t* scales, int64_t column, int64_t columns) {
  const char* at = reinterpret_cast<const char*>(scales) + q.panel_scales * column / q.k;
  for (int64_t i = 0; i < q.panel_scales * columns / q.k; i += 64) __builtin_prefetch(at + i, 0, 2);
}

}  // namespace

QuantKernel quant_kernel(Format format, Activation mode, int64_t k) {
  QuantKernel q{};
  q.k = k;
  q.format = format;
  q.factor = 1.f;
  q.panel_codes = row_code_bytes(format, k) * kPanelRows;
  q.panel_scales = row_scale_bytes(format, k) * kPanelRows;
  if (k) {
    q.codes_ahead = prefetch_distance(q.panel_codes);
    q.scales_ahead = q.codes_ahead * q.panel_scales / q.panel_codes;
    q.scale_step = q.panel_scales * kBlock / k;
  }
  with_format(format, [&](auto f) {
    using F = decltype(f);
    q.shift = f.shift;
    q.words_per_block = F::Codes::words;
    q.unpack_scales = unpack_scales<typename F::Scales>;
    if constexpr (!__is_same(typename F::Codes, Float8))
      if (mode == Activation::int8) return choose_int8<F>(q);
    choose_float<F>(q, mode);
  });
  return q;
}

int few_width(int64_t rows) { return rows <= 2 ? (rows < 2 ? 1 : 2) : rows <= 4 ? 4 : 8; }

void multiply_few(const QuantKernel& q, const Panel& panel, int64_t rows, const char* x,
                  int64_t width, float* sums) {
  const int tile = few_width(rows);
  q.few[tile == 8 ? 3 : tile / 2](q, panel, x, width, sums);
}

TileShape few_tile(int64_t rows) {
  for (int i = 0; i < kShapeCount; ++i)
    if (kShapes[i].rows >= rows) return kShapes[i];
  return kShapes[kShapeCount - 1];
}

StripPlan strip_plan(const QuantKernel& q, int panels, int strips, bool few) {
  const int64_t unit = larger(q.chunk, kBlock), word_bytes = 4 * kPanelRows * panels;
  const int64_t column_bytes = word_bytes / q.word_columns + 4 * kPanelScales * panels / q.chunk;
  StripPlan p{};
  if (few) {
    // Four panels of 256 columns in words of 2 columns or 1 would fill the L1 cache.
    p.stretch = q.word_columns < 4 ? kFewStretch / 2 : kFewStretch;
  } else {
    const int64_t parts = larger(divide_up(q.k * column_bytes * strips, kUnpackedBytes), 1);
    p.stretch = larger(divide_up(divide_up(q.k, parts), unit), 1) * unit;
  }
  const int64_t columns = smaller(p.stretch, q.k);
  p.scales_at = columns / q.word_columns * word_bytes;
  p.unpacked = p.scales_at + divide_up(columns, q.chunk) * panels * kPanelScales * 4;
  return p;
}

SegmentTile* segment_tile(const QuantKernel& q, int64_t rows, bool few) {
  for (int i = 0; i < kShapeCount; ++i)
    if (kShapes[i].rows >= rows && (few || kShapes[i].panels == kWideStrip)) return q.tiles[i];
  return q.tiles[kShapeCount - 1];
}

void unpack_strip(const QuantKernel& q, const StripPanels& strip, int64_t column, int64_t columns,
                  uint8_t* codes, float* scales, const StripPanels* ahead, int64_t later) {
  for (int p = 0; p < strip.count; ++p) {
    const Panel panel = strip.panels[p];
    if (!panel.codes) continue;
    const uint8_t* from = panel.codes + column * q.column_codes();
    int64_t distance = 0;
    if (ahead && ahead->panels[p].codes) {
      distance = ahead->panels[p].codes + later * q.column_codes() - from;
      prefetch_scales(q, ahead->panels[p].scales, later, columns);
    }
    q.unpack_codes(from, columns, distance, strip.count, codes + p * 4 * kPanelRows);
    q.unpack_scales(q, panel.scales, column, columns, strip.count, scales + p * kPanelScales);
  }
}

}  // namespace fastllm::FASTLLM_ISA
