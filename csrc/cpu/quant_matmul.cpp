// y = x @ W.T + bias for packed weights. Rows of x are brought into the form that the tiles read,
// then strips of outputs are handed out.
#include "cpu/gated_activation.h"
#include "cpu/integers.h"
#include "cpu/matmul_dense.h"
#include "cpu/quant_kernels.h"
#include "ops_core.h"

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

// A product with a quantized weight: strips of panels times all rows.
class QuantizedProduct {
 public:
  QuantizedProduct(const QuantMatmulArgs& a, const Team& team)
      : a_(a),
        team_(team),
        kernel_(quant_kernel(a.format, a.activation, a.k)),
        few_(a.m <= kFewRows),
        panels_(divide_up(a.out.n, kPanelRows)),
        wide_(few_ ? few_tile(a.m).panels : kWideStrip) {}

  void run() {
    if (a_.m == 0) return;
    const int64_t strips = divide_up(panels_, wide_);
    if (few_) {
      // Bound by reading the weight: every thread streams one range of it, and asks for the
      // beginning before it prepares its rows.
      int64_t begin, end;
      my_share(team_, strips, 1, &begin, &end);
      if (begin < end) prefetch_range(strip(begin).panels[0].codes, kernel_.panel_codes);
      prepare();
      return times_groups(begin, end, 0, 1, end);
    }
    prepare();
    const Tasks tasks = make_tasks(x_, a_.out.n, wide_, row_block(), team_);
    for (int64_t t; (t = next_task(team_)) < tasks.count();) {
      const int64_t first = t / tasks.runs * tasks.groups_per_block, run = t % tasks.runs;
      times_groups(run * tasks.run, smaller((run + 1) * tasks.run, tasks.strips), first,
                   smaller(first + tasks.groups_per_block, x_.groups()), tasks.strips);
    }
  }

 private:
  // Rows whose x stays in the L2 cache, but enough that unpacking a strip costs little beside them.
  int64_t row_block() const {
    const int64_t group = x_.group_bytes();
    return clamped(kRowBlockBytes, divide_up(192, x_.width) * group,
                   divide_up(1024, x_.width) * group);
  }

  StripPanels strip(int64_t index) const {
    StripPanels s{};
    s.count = wide_;
    for (int p = 0; p < wide_; ++p) {
      const int64_t panel = index * wide_ + p;
      if (panel < panels_)
        s.panels[p] = {static_cast<const uint8_t*>(a_.data) + panel * kernel_.panel_codes,
                       static_cast<const uint8_t*>(a_.scales) + panel * kernel_.panel_scales};
    }
    return s;
  }

  void prepare_one(int64_t row) {
    const int64_t element = a_.x_type == DType::bf16 ? 2 : 4;
    const char* x =
        row < a_.m ? static_cast<const char*>(a_.x) + row * a_.x_stride * element : nullptr;
    const int64_t word = kernel_.word_columns == 4 ? kernel_.row_offset(kBlock) : 4;
    kernel_.prepare_row(kernel_, x, a_.x_type, x_.group(row / x_.width) + row % x_.width * word,
                        x_.width);
  }

  // Few rows, or no scratch: every thread prepares its own copy. Else all prepare one together.
  void prepare() {
    x_ = {a_.m, few_ ? few_tile(a_.m).rows : kWideRows, kernel_.row_bytes(),
          static_cast<char*>(a_.scratch)};
    const int64_t padded = x_.groups() * x_.width;
    int64_t begin = 0, end = padded;
    const bool shared = a_.scratch && !few_;
    if (shared)
      my_share(team_, padded, x_.width, &begin, &end);
    else
      x_.base = static_cast<char*>(thread_scratch(Scratch::rows, padded * x_.row_bytes));
    for (int64_t row = begin; row < end; ++row) prepare_one(row);
    if (shared) team_sync(team_);
  }

  // Strips [strip, end) times groups [first, last) of rows; `all`: how many strips there are.
  void times_groups(int64_t index, int64_t end, int64_t first, int64_t last, int64_t all) {
    const int64_t columns = wide_ * kPanelRows, group_sums = x_.width * columns;
    float* sums = static_cast<float*>(
        thread_scratch(Scratch::sums, static_cast<size_t>((last - first) * group_sums * 4)));
    StripPanels here = strip(index), next{};
    for (; index < end; ++index, here = next) {
      const bool more = index + 1 < all;
      if (more) next = strip(index + 1);
      multiply_strip(kernel_, here, more ? &next : nullptr, x_.base, x_.width, a_.m, first, last,
                     few_, sums);
      for (int64_t g = first; g < last; ++g)
        store_tile(a_.out, sums + (g - first) * group_sums, columns, g * x_.width,
                   smaller(x_.width, a_.m - g * x_.width), index * columns);
    }
  }

  const QuantMatmulArgs& a_;
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
  QuantizedProduct(a, team).run();
}

}  // namespace fastllm::FASTLLM_ISA
