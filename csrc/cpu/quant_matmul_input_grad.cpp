// dx = dy @ W for a packed W. A strip of its columns is dequantized into panels in this thread's
// scratch, where it meets many rows of dy; the tiles are those of linear.
#include "cpu/matmul_dense.h"
#include "cpu/unpack_strip.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D>
struct InputGradProduct : DenseRows<D> {
  // Rows of dy that a dequantized strip meets: all of a training batch's, which then stream from the
  // L3 cache. With blocks of 512 KB, as in linear, 1024 x 1536 x 576 takes 4.5 ms, not 4.0.
  static constexpr int64_t row_block = 8 << 20;
  const QuantMatmulInputGradArgs& a;
  uint32_t* panels;
  explicit InputGradProduct(const QuantMatmulInputGradArgs& args)
      : DenseRows<D>{args.dy, args.type, args.m, args.n, args.dy_stride},
        a(args),
        panels(static_cast<uint32_t*>(thread_scratch(
            Scratch::panels, this->words() * kPanelRows * DenseRows<D>::strip * 4))) {}

  void prefetch_panel(int64_t) const {}
  void begin_strip(int64_t panel, int64_t count) const {
    const PackedMatrix w{static_cast<const uint8_t*>(a.data), static_cast<const uint8_t*>(a.scales),
                         a.format, a.n, a.out.n};
    unpack_strip(a.type, w, panel, static_cast<int>(count), panels);
  }
  template <int MR, int NP>
  void tile(int64_t, const char* x, int64_t width, bool, float* sums) const {
    dense_tile<D, MR, NP>(panels, this->words(), 0, reinterpret_cast<const uint32_t*>(x), width,
                          sums);
  }
};

}  // namespace

void quant_matmul_input_grad(const QuantMatmulInputGradArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    product(InputGradProduct<Bf16Dense>(a), a.out, a.m, a.scratch, team);
  else
    product(InputGradProduct<Float32>(a), a.out, a.m, a.scratch, team);
}

}  // namespace fastllm::FASTLLM_ISA
