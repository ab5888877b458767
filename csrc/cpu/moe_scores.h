// A row of router logits as scores: softmax or sigmoids, in buffers padded to whole vectors.
#pragma once
#include "cpu/integers.h"
#include "cpu/lse.h"
#include "cpu/sigmoid.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Keeps the sum of the chosen scores, or of a row of sigmoids, away from 0 before it divides.
constexpr float kScoreEps = 1e-20f;

FASTLLM_INLINE int64_t padded(int64_t n) { return divide_up(n, VL) * VL; }

// The row itself, or a copy of it that is padded with -inf.
FASTLLM_INLINE const float* padded_row(const float* row, int64_t n, float* copy) {
  if (n % VL == 0) return row;
  const int64_t whole = n / VL * VL;
  for (int64_t c = 0; c < whole; c += VL) vstore(copy + c, vload(row + c));
  vstore(copy + whole, load_n(row + whole, n - whole, -__builtin_inff()));
  return copy;
}

// y = exp(x - max), n a multiple of VL.
static RowLse exponentials(const float* x, int64_t n, float* y) {
  vf top = vset(-__builtin_inff());
  for (int64_t c = 0; c < n; c += VL) top = vmax(vload(x + c), top);
  const float max = vhmax(top);
  const vf base = vset(max == -__builtin_inff() ? 0.f : max);
  vf even = vset(0.f), odd = vset(0.f);
  int64_t c = 0;
  for (; c + 2 * VL <= n; c += 2 * VL) {
    const vf a = vexp(vload(x + c) - base), b = vexp(vload(x + c + VL) - base);
    vstore(y + c, a);
    vstore(y + c + VL, b);
    even += a;
    odd += b;
  }
  if (c < n) {
    const vf a = vexp(vload(x + c) - base);
    vstore(y + c, a);
    even += a;
  }
  const float sum = vsum(even + odd);
  return {max, sum, log1(sum)};
}
FASTLLM_INLINE float lse_of(const RowLse& row) { return row.max + row.log_sum; }

// y /= divisor; n a multiple of VL.
FASTLLM_INLINE void divide_row(float* y, int64_t n, float divisor) {
  for (int64_t c = 0; c < n; c += VL) vstore(y + c, vload(y + c) / vset(divisor));
}

// y = 1 / (1 + exp(-x)), 0 where x is -inf, n a multiple of VL; returns their sum.
static float sigmoids(const float* x, int64_t n, float* y) {
  vf sum = vset(0.f);
  for (int64_t c = 0; c < n; c += VL) {
    const vf s = 1.f / (1.f + exp_minus(vload(x + c)));
    vstore(y + c, s);
    sum += s;
  }
  return vsum(sum);
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
