// y = x @ weight.T + bias for weights in rows. A strip of panels is packed into this thread's
// scratch and meets all rows of x while it lies in the cache; the tiles are those of packed
// weights, so the bits are too.
#include "cpu/matmul_dense.h"
#include "cpu/pack_panel.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D>
struct LinearProduct : DenseRows<D> {
  static constexpr int64_t element = D::columns == 2 ? 2 : 4;
  const LinearArgs& a;
  uint32_t* panels;
  explicit LinearProduct(const LinearArgs& args)
      : DenseRows<D>{args.x, args.type, args.m, args.k, args.x_stride},
        a(args),
        panels(static_cast<uint32_t*>(thread_scratch(
            Scratch::panels, this->words() * kPanelRows * DenseRows<D>::strip * 4))) {}

  void prefetch_panel(int64_t) const {}  // rows of the weight are packed from where they lie
  void begin_strip(int64_t panel, int64_t count) const {
    for (int64_t p = 0; p < count; ++p) {
      const int64_t row = (panel + p) * kPanelRows, left = a.out.n - row;
      pack_panel(static_cast<const char*>(a.weight) + row * a.weight_stride * element,
                 a.weight_stride * element, left < kPanelRows ? left : kPanelRows, a.k * element,
                 this->words(), panels + p * this->words() * kPanelRows);
    }
  }
  template <int MR, int NP>
  void tile(int64_t, const char* x, int64_t width, bool, float* sums) const {
    dense_tile<D, MR, NP>(panels, this->words(), 0, reinterpret_cast<const uint32_t*>(x), width,
                          sums);
  }
};

}  // namespace

void linear(const LinearArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    product(LinearProduct<Bf16Dense>(a), a.out, a.m, a.scratch, team);
  else
    product(LinearProduct<Float32>(a), a.out, a.m, a.scratch, team);
}

}  // namespace fastllm::FASTLLM_ISA
