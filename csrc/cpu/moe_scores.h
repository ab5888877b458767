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

typedef float vhalf __attribute__((vector_size(VL * 2)));
typedef double vd __attribute__((vector_size(VL * 4)));
FASTLLM_INLINE vd widen(const float* p) {
  vhalf x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vd);
}
FASTLLM_INLINE double vsum(vd v) {
  double sum = 0.0;
  for (int i = 0; i < VL / 2; ++i) sum += v[i];
  return sum;
}

// Sums of a row and of products, n a multiple of VL, in double: every weight has their error, and
// they cost 4% of a row.
static double sum_row(const float* x, int64_t n) {
  vd low = {}, high = {};
  for (int64_t c = 0; c < n; c += VL) {
    low += widen(x + c);
    high += widen(x + c + VL / 2);
  }
  return vsum(low + high);
}
__attribute__((unused)) static double dot(const float* x, const float* y, int64_t n) {
  vd low = {}, high = {};
  for (int64_t c = 0; c < n; c += VL) {
    low += widen(x + c) * widen(y + c);
    high += widen(x + c + VL / 2) * widen(y + c + VL / 2);
  }
  return vsum(low + high);
}

// y = exp(x - max), n a multiple of VL.
static RowLse exponentials(const float* x, int64_t n, float* y) {
  vf top = vset(-__builtin_inff());
  for (int64_t c = 0; c < n; c += VL) top = vmax(vload(x + c), top);
  const float max = vhmax(top);
  const vf base = vset(max == -__builtin_inff() ? 0.f : max);
  for (int64_t c = 0; c < n; c += VL) vstore(y + c, vexp(vload(x + c) - base));
  const float sum = static_cast<float>(sum_row(y, n));
  return {max, sum, log1(sum)};
}
FASTLLM_INLINE float lse_of(const RowLse& row) { return row.max + row.log_sum; }

// y /= divisor; n a multiple of VL.
FASTLLM_INLINE void divide_row(float* y, int64_t n, float divisor) {
  for (int64_t c = 0; c < n; c += VL) vstore(y + c, vload(y + c) / vset(divisor));
}

// y = 1 / (1 + exp(-x)), 0 where x is -inf, n a multiple of VL; returns their sum.
static float sigmoids(const float* x, int64_t n, float* y) {
  for (int64_t c = 0; c < n; c += VL) vstore(y + c, 1.f / (1.f + exp_minus(vload(x + c))));
  return static_cast<float>(sum_row(y, n));
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
