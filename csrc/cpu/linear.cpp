// y = x @ weight.T + bias for weights in rows. A strip of panels is packed into this thread's
// scratch and meets all rows of x while it lies in the cache; the tiles are those of packed
// weights, so the bits are too.
#include "cpu/matmul_dense.h"
#include "cpu/transpose.h"
#include "ops.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Words [begin, words) of one row into lane r of a panel; the last word of an odd bf16 row is half
// full.
FASTLLM_INLINE void pack_row(const char* row, int64_t row_bytes, int64_t begin, int64_t words,
                             uint32_t* panel) {
  for (int64_t w = begin; w < words; ++w) {
    uint32_t word = 0;
    const int64_t left = row_bytes - 4 * w;
    if (left >= 4)
      __builtin_memcpy(&word, row + 4 * w, 4);
    else
      __builtin_memcpy(&word, row + 4 * w, 2);
    panel[w * kPanelRows] = word;
  }
}

void pack_panel(const char* rows, int64_t stride, int64_t count, int64_t row_bytes, int64_t words,
                uint32_t* panel) {
  int64_t w = 0;
#if defined(__AVX512F__)
  for (; w + 16 <= row_bytes / 4; w += 16) {
    vi r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = i < count ? vloadi(rows + i * stride + 4 * w) : vi{};
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) __builtin_memcpy(panel + (w + i) * kPanelRows, &r[i], 64);
  }
#endif
  for (int64_t i = 0; i < kPanelRows; ++i) {
    if (i < count)
      pack_row(rows + i * stride, row_bytes, w, words, panel + i);
    else
      for (int64_t j = w; j < words; ++j) panel[j * kPanelRows + i] = 0;
  }
}

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
