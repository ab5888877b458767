// The gradient of router logits. The scores of a row are made again; with d = dL/dscore,
//   softmax: dlogit = p (d - sum p d),  sigmoid: dlogit = d s (1 - s),
// and lse^2 adds 2 dz lse softmax. The row stays in L1; bound by instructions.
#include "common/scratch.h"
#include "cpu/moe_scores.h"
#include "ops_moe.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct Buffers {
  float *logits, *softmax, *scores, *d, *d_score_sum;  // [padded(experts)]
};

// Adds the gradients of the chosen experts' scores to d.
void add_choice(const MoeGateBackwardArgs& a, int64_t row, const float* scores, float* d) {
  const int32_t* ids = a.ids + row * a.k;
  const float* g = a.d_weights + row * a.k;
  const auto chosen = [&](int64_t j) { return ids[j] >= 0 && ids[j] < a.experts; };
  double sum = 0.0, mixed = 0.0;
  for (int64_t j = 0; a.renormalize && j < a.k; ++j) {
    if (!chosen(j)) continue;
    sum += scores[ids[j]];
    mixed += static_cast<double>(g[j]) * scores[ids[j]];
  }
  const double divisor = a.renormalize ? sum + kScoreEps : 1.0;
  const double mean = a.renormalize ? mixed / divisor : 0.0, factor = a.scale / divisor;
  for (int64_t j = 0; j < a.k; ++j)
    if (chosen(j)) d[ids[j]] += static_cast<float>((g[j] - mean) * factor);
}

void softmax_row(const MoeGateBackwardArgs& a, int64_t row, const Buffers& b, float dz) {
  const int64_t n = padded(a.experts);
  __builtin_memcpy(b.d, b.d_score_sum, static_cast<size_t>(n) * sizeof(float));
  add_choice(a, row, b.softmax, b.d);
  const vf mean = vset(static_cast<float>(dot(b.softmax, b.d, n)));
  for (int64_t c = 0; c < n; c += VL)
    vstore(b.d + c, vload(b.softmax + c) * ((vload(b.d + c) - mean) + dz));
}

void sigmoid_row(const MoeGateBackwardArgs& a, int64_t row, const float* x, const Buffers& b,
                 float dz) {
  const int64_t n = padded(a.experts);
  const float total = sigmoids(x, n, b.scores) + kScoreEps;
  const vf mean = vset(static_cast<float>(dot(b.scores, b.d_score_sum, n) / total));
  for (int64_t c = 0; c < n; c += VL)
    vstore(b.d + c, (vload(b.d_score_sum + c) - mean) / vset(total));
  add_choice(a, row, b.scores, b.d);
  for (int64_t c = 0; c < n; c += VL) {
    const vf s = vload(b.scores + c);
    const vf z = vload(b.softmax + c) * dz;
    vstore(b.d + c, vfma(vload(b.d + c), s * (1.f - s), z));
  }
}

void one_row(const MoeGateBackwardArgs& a, int64_t row, const Buffers& b) {
  float* out = a.dlogits + row * a.experts;
  const int64_t n = padded(a.experts);
  if (a.ids[row * a.k] < 0) {  // it chose nothing: no distribution
    __builtin_memset(out, 0, static_cast<size_t>(a.experts) * sizeof(float));
    return;
  }
  const float* x = padded_row(a.logits + row * a.stride, a.experts, b.logits);
  const RowLse lse = exponentials(x, n, b.softmax);
  divide_row(b.softmax, n, lse.sum);
  const float dz = 2.f * *a.d_z_sum * lse_of(lse);
  if (a.sigmoid)
    sigmoid_row(a, row, x, b, dz);
  else
    softmax_row(a, row, b, dz);
  __builtin_memcpy(out, b.d, static_cast<size_t>(a.experts) * sizeof(float));
}

}  // namespace

void moe_gate_backward(const MoeGateBackwardArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, a.tokens, 1, &begin, &end);
  if (begin == end) return;
  const int64_t n = padded(a.experts);
  auto* at = static_cast<float*>(
      thread_scratch(Scratch::rows, static_cast<size_t>(5 * n) * sizeof(float)));
  const Buffers b{at, at + n, at + 2 * n, at + 3 * n, at + 4 * n};
  for (int64_t c = 0; c < n; ++c) b.d_score_sum[c] = c < a.experts ? a.d_score_sum[c] : 0.f;
  for (int64_t row = begin; row < end; ++row) one_row(a, row, b);
}

}  // namespace fastllm::FASTLLM_ISA
