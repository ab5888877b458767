// Quantizes rows of a weight into panels of 16: 256 columns of a panel are transposed, so that each
// lane owns a row, and every group of columns finds its scales and codes there. Formats of one rule
// are bound by memory, those that search by its fits.
#include <type_traits>

#include "common/formats.h"
#include "common/scratch.h"
#include "cpu/integers.h"
#include "cpu/pack_panel.h"
#include "cpu/quantize_rules.h"
#include "ops_quantize.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int kStretch = 256;          // columns at a time
constexpr int64_t kTileRows = 128;     // of an fp8_block scale
constexpr float kUnseen = 0x1p-40f;    // of columns without importance
constexpr int kTooLarge = 0x4f800000;  // 2^32: no fp16 scale of any format reaches it

struct Stretch {
  alignas(64) float x[kStretch * kPanelRows];
  alignas(64) float w[kStretch * kPanelRows];
  vi codes[kStretch];
};

// Columns [c, c + n) of a panel's rows, column after column; rows that do not exist are zero.
template <class From>
void load_columns(const From* rows, int64_t stride, int64_t count, int64_t c, int64_t n,
                  float* to) {
  if constexpr (sizeof(From) == 4) {
    pack_panel(reinterpret_cast<const char*>(rows + c), stride * 4, count, n * 4, n,
               reinterpret_cast<uint32_t*>(to));
  } else {
    alignas(64) float copy[kPanelRows * kStretch];
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < n; i += VL) vstore(copy + r * n + i, load(rows + r * stride + c + i));
    pack_panel(reinterpret_cast<const char*>(copy), n * 4, count, n * 4, n,
               reinterpret_cast<uint32_t*>(to));
  }
}

void lower(int64_t* to, int64_t value) {
  int64_t now = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (value < now &&
         !__atomic_compare_exchange_n(to, &now, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}
void report(int64_t* to, int64_t panel, int v, vi lanes) {
  for (int i = 0; i < VL; ++i)
    if (lanes[i]) lower(to, panel * kPanelRows + v * VL + i);
}

// One panel of one weight: what its groups of columns share.
struct Panel {
  const QuantizeArgs& a;
  int64_t index;
  PanelOut out;
  Stretch& s;

  Columns group(int64_t c, int n, int v) const {
    return {s.x + c * kPanelRows + v * VL, s.w + c * kPanelRows + v * VL, n};
  }
  template <int WORDS>
  void store_all(int64_t first, int64_t c, int n, int v) {
    for (int i = 0; i < n; i += kBlock)
      store_codes<WORDS>(s.codes + i, out.live[v],
                         out.data + (first + c + i) / kBlock * (WORDS * 4 * kPanelRows), v);
  }
};

// Importances of the stretch; a group of (almost) none counts every column alike, and little.
void load_weights(Panel& p, int64_t first, int64_t n, int64_t count, int group) {
  const QuantizeArgs& a = p.a;
  const float* importance = a.importance;
  if (importance == nullptr) {
    for (int64_t i = 0; i < n * kPanelRows; i += VL) vstore(p.s.w + i, vset(1.f));
    return;
  }
  if (a.importance_stride == 0)
    for (int64_t c = 0; c < n; ++c)
      for (int v = 0; v < NV; ++v)
        vstore(p.s.w + c * kPanelRows + v * VL, vset(importance[first + c]));
  else
    load_columns(importance + p.index * kPanelRows * a.importance_stride, a.importance_stride,
                 count, first, n, p.s.w);
  for (int64_t c = 0; c < n; c += group)
    for (int v = 0; v < NV; ++v) {
      float* w = p.s.w + c * kPanelRows + v * VL;
      vf sum{};
      for (int i = 0; i < group; ++i) sum = sum + vload(w + i * kPanelRows);
      for (int i = 0; i < group; ++i)
        vstore(w + i * kPanelRows, sum > kUnseen ? vload(w + i * kPanelRows) : vset(kUnseen));
    }
}

// Negative zeros become zeros; rows that are not finite, or too large for any fp16 scale, are noted.
void clean(Panel& p, int64_t n, bool halves) {
  for (int v = 0; v < NV; ++v) {
    vi most{};
    for (int64_t c = 0; c < n; ++c) {
      float* x = p.s.x + c * kPanelRows + v * VL;
      const vi size = vbits(vload(x)) & 0x7fffffff;
      most = size > most ? size : most;
      vstore(x, vload(x) + 0.f);
    }
    const vi infinite = most >= vseti(0x7f800000);
    report(p.a.bad, p.index, v, p.out.live[v] & infinite);
    if (halves) p.out.overflow[v] |= p.out.live[v] & (most >= vseti(kTooLarge)) & ~infinite;
  }
}

// Formats whose groups have fp16 scales: d, or d with m or z. `encode(group, codes, first scale,
// second scale)` finds them.
template <int WORDS, int SIDES, class Encode>
void half_groups(Panel& p, int64_t first, int64_t n, int group, Encode encode) {
  for (int64_t c = 0; c < n; c += group)
    for (int v = 0; v < NV; ++v) {
      vf second{};
      const vf d = encode(p.group(c, group, v), p.s.codes, second);
      const int64_t at = (first + c) / group * (2 * SIDES * kPanelRows);
      p.out.half(at, v, d);
      if constexpr (SIDES == 2) p.out.half(at + 2 * kPanelRows, v, second);
      p.store_all<WORDS>(first, c, group, v);
    }
}
template <int WORDS, int SIDES, class Encode>
void affine_groups(Panel& p, int64_t first, int64_t n, int group, Encode encode) {
  half_groups<WORDS, SIDES>(p, first, n, group, [&](const Columns& g, vi* codes, vf& second) {
    const Affine f = encode(g, codes);
    second = f.m;
    return f.d;
  });
}

template <int WORDS>
void super_min(Panel& p, int64_t first, int v) {
  constexpr float levels = WORDS == 4 ? 15.f : 31.f;
  const Columns g = p.group(0, kStretch, v);
  const SuperMin f = fit_super_min(g, levels);
  const int64_t at = first / kStretch * (20 * kPanelRows);
  p.out.half(at, v, f.d);
  p.out.half(at + 2 * kPanelRows, v, f.dmin);
  for (int i = 0; i < SuperMin::subs; ++i) {
    p.out.byte(at + (4 + 2 * i) * kPanelRows, v, f.sc[i]);
    p.out.byte(at + (5 + 2 * i) * kPanelRows, v, f.mn[i]);
    const Columns sub = g.at(i * SuperMin::columns, SuperMin::columns);
    const vf low = f.dmin * f.mn[i], factor = inverse(f.d * f.sc[i]);
    for (int c = 0; c < SuperMin::columns; ++c)
      p.s.codes[i * SuperMin::columns + c] =
          vtruncate(vclamp(vround((sub.value(c) + low) * factor), vset(0.f), vset(levels)));
  }
  p.store_all<WORDS>(first, 0, kStretch, v);
}

void super(Panel& p, int64_t first, int v) {
  const Columns g = p.group(0, kStretch, v);
  const Super f = fit_super(g);
  const int64_t at = first / kStretch * (18 * kPanelRows);
  p.out.half(at, v, f.d);
  for (int i = 0; i < Super::subs; ++i) {
    p.out.byte(at + (2 + i) * kPanelRows, v, f.sc[i]);
    const Columns sub = g.at(i * Super::columns, Super::columns);
    const vf factor = inverse(f.d * f.sc[i]);
    for (int c = 0; c < Super::columns; ++c)
      p.s.codes[i * Super::columns + c] =
          vtruncate(vclamp(vround(sub.value(c) * factor), vset(-32.f), vset(31.f))) + 32;
  }
  p.store_all<6>(first, 0, kStretch, v);
}

// What the scales of formats with fp32 scales follow from, found in a pass of its own.
struct Peaks {
  alignas(64) float row[kPanelRows];  // of int8, fp8 and nf4_dq
  const float* tiles;                 // of fp8_block, one for every 128 columns
};

void nf4(Panel& p, int64_t first, int64_t n, bool twice, const Peaks& peaks) {
  for (int64_t c = 0; c < n; c += 64)
    for (int v = 0; v < NV; ++v) {
      const Columns g = p.group(c, 64, v);
      vf d = magnitude_peak(g);
      if (!twice) {
        p.out.single((first + c) / 64 * (4 * kPanelRows), v, d);
      } else {
        const vf row = short_scale(vload(peaks.row + v * VL) / 255.f);
        vf steps = vclamp(vround(d * inverse(row)), vset(0.f), vset(255.f));
        steps = d > 0.f ? vmax(steps, vset(1.f)) : steps;
        p.out.byte(4 * kPanelRows + (first + c) / 64 * kPanelRows, v, steps);
        d = row * steps;
      }
      nearest_nf4(g, d, p.s.codes);
      p.store_all<4>(first, c, 64, v);
    }
}

// Bytes under a scale of a whole row, or of a tile's 128 columns.
template <bool E4M3>
void byte_rows(Panel& p, int64_t first, int64_t n, const Peaks& peaks) {
  for (int64_t c = 0; c < n; c += kBlock)
    for (int v = 0; v < NV; ++v) {
      const Columns g = p.group(c, kBlock, v);
      if constexpr (!E4M3) {
        nearest_bytes(g, short_scale(vload(peaks.row + v * VL) / 127.f), p.s.codes);
      } else {
        const vf peak =
            peaks.tiles ? vset(peaks.tiles[(first + c) / kTileRows]) : vload(peaks.row + v * VL);
        nearest_e4m3(g, short_scale(peak / 448.f), p.s.codes);
      }
      p.store_all<8>(first, c, kBlock, v);
    }
}

void encode_stretch(Panel& p, int64_t first, int64_t n, const Peaks& peaks) {
  const bool plain = p.a.importance == nullptr;
  const int group = layout_of(p.a.format).group;
  const auto one = [&](auto words, auto encode) {
    half_groups<words, 1>(p, first, n, group,
                          [&](const Columns& g, vi* codes, vf&) { return encode(g, codes); });
  };
  using std::integral_constant;
  constexpr integral_constant<int, 4> four;
  constexpr integral_constant<int, 5> five;
  constexpr integral_constant<int, 8> eight;
  switch (p.a.format) {
    case Format::q4_0:
      if (plain) return one(four, [](auto& g, vi* u) { return around_zero(g, 8, u); });
      [[fallthrough]];
    case Format::int4_g32:
    case Format::int4_g64:
    case Format::int4_g128:
      return one(four, [](auto& g, vi* u) { return searched_signed(g, 8, u); });
    case Format::q5_0:
      if (plain) return one(five, [](auto& g, vi* u) { return around_zero(g, 16, u); });
      return one(five, [](auto& g, vi* u) { return searched_signed(g, 16, u); });
    case Format::q8_0:
      if (plain) return one(eight, [](auto& g, vi* u) { return signed_bytes(g, u); });
      return one(eight, [](auto& g, vi* u) { return searched_signed(g, 0, u); });
    case Format::q4_1:
      return affine_groups<4, 2>(p, first, n, group, [&](auto& g, vi* u) {
        return plain ? from_minimum(g, 15, u) : searched_affine(g, 15.f, u);
      });
    case Format::q5_1:
      return affine_groups<5, 2>(p, first, n, group, [&](auto& g, vi* u) {
        return plain ? from_minimum(g, 31, u) : searched_affine(g, 31.f, u);
      });
    case Format::int4_asym_g32:
    case Format::int4_asym_g64:
    case Format::int4_asym_g128:
      return affine_groups<4, 2>(p, first, n, group,
                                 [](auto& g, vi* u) { return searched_zero(g, u); });
    case Format::q4_k:
      for (int v = 0; v < NV; ++v) super_min<4>(p, first, v);
      return;
    case Format::q5_k:
      for (int v = 0; v < NV; ++v) super_min<5>(p, first, v);
      return;
    case Format::q6_k:
      for (int v = 0; v < NV; ++v) super(p, first, v);
      return;
    case Format::nf4:
    case Format::nf4_dq: return nf4(p, first, n, p.a.format == Format::nf4_dq, peaks);
    case Format::int8: return byte_rows<false>(p, first, n, peaks);
    default: return byte_rows<true>(p, first, n, peaks);
  }
}

template <class From>
float row_peak(const From* row, int64_t n) {
  vf most{};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) most = vmax(vabs(load(row + i)), most);
  return vhmax(most);
}

// Largest magnitudes of rows, or of the columns of a tile, and the scales that follow from them.
template <class From>
void row_scales(const QuantizeArgs& a, const From* rows, int64_t count, Panel& p, Peaks& peaks) {
  for (int64_t r = 0; r < kPanelRows; ++r)
    peaks.row[r] = r < count ? row_peak(rows + r * a.stride, a.k) : 0.f;
  const float top = a.format == Format::int8 ? 127.f : a.format == Format::fp8 ? 448.f : 255.f;
  for (int v = 0; v < NV; ++v) p.out.single(0, v, short_scale(vload(peaks.row + v * VL) / top));
}
void tile_scales(const QuantizeArgs& a, Panel& p, const Peaks& peaks) {
  for (int64_t t = 0; t < divide_up(a.k, kTileRows); ++t)
    for (int v = 0; v < NV; ++v)
      p.out.single(t * 4 * kPanelRows, v, short_scale(vset(peaks.tiles[t]) / 448.f));
}

template <class From>
void quantize_panel(const QuantizeArgs& a, const From* w, int64_t index, Stretch& s, Peaks& peaks) {
  const From* rows = w + index * kPanelRows * a.stride;
  const int64_t count = smaller(kPanelRows, a.n - index * kPanelRows);
  const FormatLayout layout = layout_of(a.format);
  const bool halves = layout.scales == DType::f16 || layout.record > 0;
  Panel p = {a, index, {}, s};
  p.out.data = static_cast<uint8_t*>(a.data) + index * kPanelRows * row_code_bytes(a.format, a.k);
  p.out.scales =
      static_cast<uint8_t*>(a.scales) + index * kPanelRows * row_scale_bytes(a.format, a.k);
  for (int v = 0; v < NV; ++v)
    for (int i = 0; i < VL; ++i) p.out.live[v][i] = v * VL + i < count ? -1 : 0;
  if (peaks.tiles != nullptr)
    tile_scales(a, p, peaks);
  else if (layout.group == 0 || layout.record < 0)
    row_scales(a, rows, count, p, peaks);
  if (layout.record < 0)  // the bytes of rows end on a multiple of four groups
    for (int64_t b = a.k / 64; b % 4 != 0; ++b)
      for (int v = 0; v < NV; ++v) p.out.byte((4 + b) * kPanelRows, v, vf{});
  for (int64_t c = 0; c < a.k; c += kStretch) {
    const int64_t n = smaller(kStretch, a.k - c);
    load_columns(rows, a.stride, count, c, n, s.x);
    clean(p, n, halves);
    if (halves) load_weights(p, c, n, count, layout.group);
    encode_stretch(p, c, n, peaks);
  }
  for (int v = 0; v < NV; ++v) report(a.bad + 1, index, v, p.out.overflow[v]);
}

// fp8_block: the rows of a tile are one task, whose largest magnitudes are found first.
template <class From>
void quantize_tiles(const QuantizeArgs& a, const From* w, int64_t task, Stretch& s, Peaks& peaks) {
  const int64_t tiles = divide_up(a.k, kTileRows), first = task * kTileRows;
  float* found = static_cast<float*>(thread_scratch(Scratch::rows, tiles * sizeof(float)));
  for (int64_t t = 0; t < tiles; ++t) found[t] = 0.f;
  const int64_t end = smaller(first + kTileRows, a.n);
  for (int64_t r = first; r < end; ++r)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t c = t * kTileRows;
      const float peak = row_peak(w + r * a.stride + c, smaller(kTileRows, a.k - c));
      found[t] = peak > found[t] ? peak : found[t];
    }
  peaks.tiles = found;
  for (int64_t r = first; r < end; r += kPanelRows) quantize_panel(a, w, r / kPanelRows, s, peaks);
}

}  // namespace

void quantize(const QuantizeArgs& a, const Team& team) {
  Stretch& s = *static_cast<Stretch*>(thread_scratch(Scratch::panels, sizeof(Stretch)));
  const bool tiled = a.format == Format::fp8_block;
  const int64_t tasks = divide_up(a.n, tiled ? kTileRows : kPanelRows);
  dispatch_stored_float(a.type, [&](auto type) {
    const auto* w = static_cast<const decltype(type)*>(a.w);
    Peaks peaks{};
    for (int64_t task = next_task(team); task < tasks; task = next_task(team)) {
      if (tiled)
        quantize_tiles(a, w, task, s, peaks);
      else
        quantize_panel(a, w, task, s, peaks);
    }
  });
}

}  // namespace fastllm::FASTLLM_ISA
