// RMSNorm over the last dimension, optionally of a residual sum. Two passes over a row that stays
// in
// cache: the sum of squares, then the scaled store.
#include "cpu/simd.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// The row as f32 at column c; with a residual the sum is stored to h on the way.
template <class X>
FASTLLM_INLINE vf row_sum_of_squares_step(const X* x, const float* residual, float* h, int64_t c,
                                          vf sum) {
  vf v = load(x + c);
  if (residual) {
    v = vload(residual + c) + v;
    vstore(h + c, v);
  }
  return vfma(v, v, sum);
}

template <class X>
float sum_of_squares(const X* x, const float* residual, float* h, int64_t n) {
  vf sum = vset(0.f);
  int64_t c = 0;
  for (; c + VL <= n; c += VL) sum = row_sum_of_squares_step(x, residual, h, c, sum);
  float total = vsum(sum);
  for (; c < n; ++c) {
    float v = load1(x + c);
    if (residual) v = h[c] = residual[c] + v;
    total = sfma(v, v, total);
  }
  return total;
}

template <class Y, class H, class W>
void scale_row(Y* y, const H* h, const W* weight, float rstd, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL) store(y + c, (load(h + c) * rstd) * load(weight + c));
  for (; c < n; ++c) store1(y + c, (load1(h + c) * rstd) * load1(weight + c));
}

template <class Y, class X, class W>
void norm_rows(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row / a.inner * a.x_outer_stride +
                 row % a.inner * a.x_inner_stride;
    Y* y = static_cast<Y*>(a.y) + row * a.n;
    const float* residual = a.residual ? a.residual + row * a.n : nullptr;
    float* h = a.h ? a.h + row * a.n : nullptr;
    const float mean = sum_of_squares(x, residual, h, a.n) / static_cast<float>(a.n);
    const float rstd = 1.f / __builtin_sqrtf(mean + a.eps);
    if (h)
      scale_row(y, h, weight, rstd, a.n);
    else
      scale_row(y, x, weight, rstd, a.n);
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, a.outer * a.inner, 1, &begin, &end);
  dispatch_float(a.y_type, [&](auto y) {
    dispatch_float(a.x_type, [&](auto x) {
      dispatch_float(a.weight_type, [&](auto weight) {
        norm_rows<decltype(y), decltype(x), decltype(weight)>(a, begin, end);
      });
    });
  });
}

}  // namespace fastllm::FASTLLM_ISA
