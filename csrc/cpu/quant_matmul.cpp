// y = x @ W.T + bias for packed weights. Rows of x are brought into the form that the tiles read,
// then strips of outputs are handed out. finished_product goes on with a residual or a gated
// activation.
#include "cpu/gated_activation.h"
#include "cpu/matmul_dense.h"
#include "cpu/quant_strips.h"
#include "ops_quant.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D>
struct DenseProduct : DenseRows<D> {
  const void* data;
  explicit DenseProduct(const QuantMatmulArgs& a)
      : DenseRows<D>{a.x, a.x_type, a.m, a.k, a.x_stride}, data(a.data) {}
  void begin_strip(int64_t, int64_t) const {}
  void prefetch_panel(int64_t panel) const {
    const int64_t bytes = this->words() * kPanelRows * 4;
    prefetch_range(static_cast<const char*>(data) + panel * bytes, bytes);
  }
  template <int MR, int NP>
  void tile(int64_t panel, const char* x, int64_t width, bool first, float* sums) const {
    const int64_t words = this->words();
    dense_tile<D, MR, NP>(static_cast<const uint32_t*>(data) + panel * words * kPanelRows, words,
                          first ? prefetch_distance(words * kPanelRows * 4) : 0,
                          reinterpret_cast<const uint32_t*>(x), width, sums);
  }
};

// VL columns of fp32 sums with the bias, as rows of x would hold them.
FASTLLM_INLINE vf rounded_sums(const QuantMatmulArgs& a, const float* sums, int64_t column) {
  const MatmulOutput& o = a.out;
  const int64_t left = o.n - column;
  vf v = vload(sums);
  if (o.bias)
    dispatch_float(o.bias_type, [&](auto type) {
      const auto* bias = static_cast<const decltype(type)*>(o.bias) + column;
      v = v + (left >= VL ? load(bias) : load_n(bias, left));
    });
  return a.x_type == DType::bf16 ? vround_bf16(v) : v;
}

// y = residual + rounded sums, `columns` of them from `column` on.
FASTLLM_INLINE void add_residual(const FinishedProductArgs& f, const float* sums, int64_t row,
                                 int64_t column, int64_t columns) {
  const int64_t at = row * f.product.out.n + column;
  const float* residual = f.residual + at;
  float* y = static_cast<float*>(f.product.out.y) + at;
  for (int64_t c = 0; c < columns; c += VL) {
    const vf p = rounded_sums(f.product, sums + c, column + c);
    if (columns - c >= VL)
      vstore(y + c, vload(residual + c) + p);
    else
      store_n(y + c, load_n(residual + c, columns - c) + p, columns - c);
  }
}

// y = act(gate) * up, `columns` (a multiple of 16) of them from `column` on.
FASTLLM_INLINE void gate_columns(const FinishedProductArgs& f, const float* gate, const float* up,
                                 int64_t row, int64_t column, int64_t columns) {
  const int64_t inner = f.product.out.n / 2, at = row * inner + column;
  for (int64_t c = 0; c < columns; c += VL) {
    const vf g = rounded_sums(f.product, gate + c, column + c);
    const vf u = rounded_sums(f.product, up + c, inner + column + c);
    const vf y =
        f.gating == Gating::silu ? gated<Gating::silu>(g, u) : gated<Gating::gelu_tanh>(g, u);
    dispatch_float(f.product.out.y_type, [&](auto type) {
      store(static_cast<decltype(type)*>(f.product.out.y) + at + c, y);
    });
  }
}

// n columns of what finish_product makes; up lies `inner` columns behind gate.
template <class T>
void residual_columns(float* y, const float* residual, const T* product, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) vstore(y + c, vload(residual + c) + load(product + c));
  if (c < n) store_n(y + c, load_n(residual + c, n - c) + load_n(product + c, n - c), n - c);
}
template <class T>
void gated_columns(Gating gating, T* y, const T* gate, int64_t inner, int64_t n) {
  for (int64_t c = 0; c < n; c += VL) {
    const int64_t left = n - c;
    const vf g = left >= VL ? load(gate + c) : load_n(gate + c, left);
    const vf u = left >= VL ? load(gate + inner + c) : load_n(gate + inner + c, left);
    const vf v =
        gating == Gating::silu ? gated<Gating::silu>(g, u) : gated<Gating::gelu_tanh>(g, u);
    if (left >= VL)
      store(y + c, v);
    else
      store_n(y + c, v, left);
  }
}

// A product with a quantized weight: strips of panels times all rows. What follows it, if given,
// reads a strip's sums while they are in the L1 or L2 cache; a gated activation those of two strips.
class QuantizedProduct {
 public:
  QuantizedProduct(const QuantMatmulArgs& a, const FinishedProductArgs* then, const Team& team)
      : a_(a),
        then_(then),
        gated_(then && !then->residual),
        team_(team),
        kernel_(quant_kernel(a.format, a.activation, a.k)),
        few_(a.m <= kFewRows),
        panels_(divide_up(gated_ ? a.out.n / 2 : a.out.n, kPanelRows)),
        wide_(!few_         ? kWideStrip
              : kernel_.few ? 1
                            : few_tile(a.m).panels) {}

  void run() {
    if (a_.m == 0) return;
    const int64_t strips = divide_up(panels_, wide_);
    if (few_) {
      // Bound by reading the weight: every thread streams one range of it, and asks for the
      // beginning before it prepares its rows.
      int64_t begin, end;
      my_share(team_, strips, 1, &begin, &end);
      if (begin < end) prefetch_range(strip(begin, 0).panels[0].codes, kernel_.panel_codes);
      prepare();
      return times_groups(begin, end, 0, 1, -1);
    }
    prepare();
    const Tasks tasks = make_tasks(x_, panels_ * kPanelRows, wide_, row_block(), team_);
    for (int64_t t = next_task(team_); t < tasks.count();) {
      const int64_t then = next_task(team_);  // what the last strip asks for
      const int64_t first = t / tasks.runs * tasks.groups_per_block, run = t % tasks.runs;
      times_groups(run * tasks.run, smaller((run + 1) * tasks.run, tasks.strips), first,
                   smaller(first + tasks.groups_per_block, x_.groups()),
                   then < tasks.count() ? then % tasks.runs * tasks.run : -1);
      t = then;
    }
  }

 private:
  // Rows whose x stays in the L2 cache, but enough that unpacking a strip costs little beside them.
  int64_t row_block() const {
    const int64_t group = x_.group_bytes();
    return clamped(kRowBlockBytes, divide_up(512, x_.width) * group,
                   divide_up(1024, x_.width) * group);
  }

  // Side 1 are the rows of up behind those of gate; strip -1 is none.
  StripPanels strip(int64_t index, int side) const {
    StripPanels s{};
    s.count = wide_;
    for (int p = 0; index >= 0 && p < wide_; ++p) {
      const int64_t panel = index * wide_ + p, at = side * panels_ + panel;
      if (panel < panels_)
        s.panels[p] = {static_cast<const uint8_t*>(a_.data) + at * kernel_.panel_codes,
                       static_cast<const uint8_t*>(a_.scales) + at * kernel_.panel_scales};
    }
    return s;
  }

  // Columns of one row; `part` is the kernel for so many.
  void prepare_part(const QuantKernel& part, int64_t row, int64_t column) const {
    const int64_t element = a_.x_type == DType::bf16 ? 2 : 4;
    const char* x = static_cast<const char*>(a_.x) + (row * a_.x_stride + column) * element;
    const int64_t word = kernel_.word_columns == 4 ? kernel_.row_offset(kBlock) : 4;
    kernel_.prepare_row(
        part, row < a_.m ? x : nullptr, a_.x_type,
        x_.group(row / x_.width) + kernel_.row_offset(column) * x_.width + row % x_.width * word,
        x_.width);
  }

  // The rows of a group share the lines of its prepared form: a stretch of columns of all of them is
  // written while it is in the L1 cache.
  void prepare_group(int64_t group) const {
    if (!few_ && kernel_.prepare_group && a_.x_type == DType::bf16) {
      const int64_t row = group * x_.width;
      return kernel_.prepare_group(kernel_, static_cast<const uint16_t*>(a_.x) + row * a_.x_stride,
                                   a_.x_stride, smaller(x_.width, a_.m - row), x_.group(group),
                                   x_.width);
    }
    constexpr int64_t stretch = 512;
    QuantKernel part = kernel_;
    for (int64_t column = 0; column < a_.k; column += stretch) {
      part.k = smaller(stretch, a_.k - column);
      for (int64_t i = 0; i < x_.width; ++i) prepare_part(part, group * x_.width + i, column);
    }
  }

  // Few rows, or no scratch: every thread prepares its own copy. Else all prepare one together.
  void prepare() {
    x_ = {a_.m,
          !few_         ? kernel_.wide_rows()
          : kernel_.few ? few_width(a_.m)
                        : few_tile(a_.m).rows,
          kernel_.row_bytes(), static_cast<char*>(a_.scratch)};
    const int64_t padded = x_.groups() * x_.width;
    int64_t begin = 0, end = padded;
    const bool shared = a_.scratch && !few_;
    if (shared)
      my_share(team_, padded, x_.width, &begin, &end);
    else
      x_.base = static_cast<char*>(thread_scratch(Scratch::rows, padded * x_.row_bytes));
    for (int64_t row = begin; row < end; row += x_.width) prepare_group(row / x_.width);
    if (shared) team_sync(team_);
  }

  // Strips [index, end) times groups [first, last) of rows; `then`: the strip behind them, or -1.
  void times_groups(int64_t index, int64_t end, int64_t first, int64_t last, int64_t then) {
    const int sides = gated_ ? 2 : 1;
    if (few_ && kernel_.few) return times_few(index, end, sides);
    const int64_t columns = wide_ * kPanelRows;
    for (; index < end; ++index) {
      const StripPanels here[2] = {strip(index, 0), strip(index, sides - 1)};
      const int64_t behind = index + 1 < end ? index + 1 : then;
      const StripPanels next[2] = {strip(behind, 0), strip(behind, sides - 1)};
      multiply_strips(kernel_, here, sides, behind >= 0 ? next : nullptr, x_, first, last, few_,
                      [&](int64_t group, float* sums, int64_t size) {
                        finish(sums, size, group * x_.width, index * columns);
                      });
    }
  }

  // The same for rows of one small tile and strips of one panel, decoded in registers.
  void times_few(int64_t index, int64_t end, int sides) {
    alignas(64) float sums[2][kFewRows * kPanelRows];
    for (; index < end; ++index) {
      for (int side = 0; side < sides; ++side)
        multiply_few(kernel_, strip(index, side).panels[0], a_.m, x_.base, x_.width, sums[side]);
      finish(sums[0], sums[1] - sums[0], 0, index * kPanelRows);
    }
  }

  // Asks for what the next group will write, so that its stores do not queue.
  void prefetch_outputs(int64_t row, int64_t column) const {
    const int64_t bytes = a_.out.y_type == DType::bf16 ? 2 : 4;
    const int64_t stride = then_ ? (gated_ ? a_.out.n / 2 : a_.out.n) : a_.out.y_stride;
    const char* at = static_cast<const char*>(a_.out.y) + (row * stride + column) * bytes;
    for (int64_t m = smaller(x_.width, a_.m - row); m > 0; --m, at += stride * bytes)
      for (int64_t b = 0; b < wide_ * kPanelRows * bytes; b += 64) __builtin_prefetch(at + b, 1);
  }

  // The rows of a group from `row` on; `size`: how far behind those of gate the sums of up are.
  void finish(float* sums, int64_t size, int64_t row, int64_t column) const {
    const int64_t columns = wide_ * kPanelRows, rows = smaller(x_.width, a_.m - row);
    prefetch_outputs(row + x_.width, column);
    if (!then_) return store_tile(a_.out, sums, columns, row, rows, column);
    const int64_t live = smaller(columns, (gated_ ? a_.out.n / 2 : a_.out.n) - column);
    for (int64_t m = 0; m < rows; ++m, sums += columns)
      if (gated_)
        gate_columns(*then_, sums, sums + size, row + m, column, live);
      else
        add_residual(*then_, sums, row + m, column, live);
  }

  const QuantMatmulArgs& a_;
  const FinishedProductArgs* const then_;
  const bool gated_;
  const Team& team_;
  const QuantKernel kernel_;
  const bool few_;
  const int64_t panels_;
  const int wide_;
  RowGroups x_{};
};

}  // namespace

void quant_matmul(const QuantMatmulArgs& a, const Team& team) {
  if (a.format == Format::bf16)
    return product(DenseProduct<Bf16Dense>(a), a.out, a.m, a.scratch, team);
  if (a.format == Format::f32)
    return product(DenseProduct<Float32>(a), a.out, a.m, a.scratch, team);
  QuantizedProduct(a, nullptr, team).run();
}

void finished_product(const FinishedProductArgs& a, const Team& team) {
  QuantizedProduct(a.product, &a, team).run();
}

void finish_product(const FinishProductArgs& a, const Team& team) {
  constexpr int64_t kColumns = 256;
  const int64_t runs = divide_up(a.columns, kColumns);
  int64_t begin, end;
  my_share(team, a.m * runs, 1, &begin, &end);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = i % runs * kColumns, at = i / runs * a.columns + column;
    const int64_t n = smaller(kColumns, a.columns - column);
    dispatch_float(a.type, [&](auto type) {
      using T = decltype(type);
      const T* product = static_cast<const T*>(a.product);
      if (a.residual)
        residual_columns(static_cast<float*>(a.y) + at, a.residual + at, product + at, n);
      else
        gated_columns(a.gating, static_cast<T*>(a.y) + at, product + i / runs * a.columns + at,
                      a.columns, n);
    });
  }
}

}  // namespace fastllm::FASTLLM_ISA
