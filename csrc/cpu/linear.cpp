// y = x @ weight.T + bias for weights in rows. With few rows of x the weight is read where it lies;
// with many, a strip of panels is packed into this thread's scratch and meets all rows of x while it
// lies in the cache. The sums are those of packed weights, so the bits are too.
#include "cpu/matmul_dense.h"
#include "cpu/pack_panel.h"
#include "cpu/rows_tile.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D>
struct LinearProduct : DenseRows<D> {
  static constexpr int64_t element = D::columns == 2 ? 2 : 4;
  static constexpr int few = kFewRowsOf<D>;
  const LinearArgs& a;
  const RowsInPlace weight;
  const bool direct;  // it is read where it lies
  int64_t end = 0;    // few rows: where this thread's rows of the weight end
  uint32_t* panels;

  LinearProduct(const LinearArgs& args, const Team& team)
      : DenseRows<D>{args.x, args.type, args.m, args.k, args.x_stride},
        a(args),
        weight{static_cast<const char*>(args.weight), args.weight_stride * element,
               args.k * element},
        direct(kReadsRowsOf<D> && args.m <= few && weight.whole_lines()),
        panels(static_cast<uint32_t*>(thread_scratch(
            Scratch::panels, this->words() * kPanelRows * DenseRows<D>::strip * 4))) {
    int64_t begin;
    my_share(team, a.out.n, kPanelRows, &begin, &end);
  }

  void prefetch_panel(int64_t panel) const { weight.prefetch(panel * kPanelRows, end); }
  void begin_strip(int64_t panel, int64_t count) const {
    if (direct) return;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t first = (panel + p) * kPanelRows;
      pack_panel(weight.data + first * weight.stride, weight.stride,
                 smaller(a.out.n - first, kPanelRows), weight.bytes, this->words(),
                 panels + p * this->words() * kPanelRows);
    }
  }
  template <int MR, int NP>
  void tile(int64_t panel, const char* x, int64_t width, bool, float* sums) const {
    const auto* words = reinterpret_cast<const uint32_t*>(x);
#if defined(__AVX512F__)
    if constexpr (NP == 1 && kReadsRowsOf<D>)
      if (direct) return weight.tile<D, MR>(panel * kPanelRows, end, true, words, width, sums);
#endif
    dense_tile<D, MR, NP>(panels, this->words(), 0, words, width, sums);
  }
};

}  // namespace

void linear(const LinearArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    product(LinearProduct<Bf16Dense>(a, team), a.out, a.m, a.scratch, team);
  else
    product(LinearProduct<Float32>(a, team), a.out, a.m, a.scratch, team);
}

}  // namespace fastllm::FASTLLM_ISA
