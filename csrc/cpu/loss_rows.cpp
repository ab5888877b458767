// Losses that see one target a row of logits: log-probability, entropy, cross entropy; and the
// gradient of the logits. One thread a row: its logits are read from the cache three times.
//   dz = a p + b [v = target] + c + e p log p
#include "common/scratch.h"
#include "cpu/softmax_rows.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct Coefficients {
  float a, b, c, e;
};

// -sum p log p from S = sum exp(z - M): log S - sum exp(z - M) (z - M) / S, two positive terms.
float entropy_of(const float* z, int64_t n, const RowLse& lse) {
  const double sum = sum_columns(n, [&](int64_t c, int64_t live) {
    const vf x = vload_part(z + c, live, -kInf) - lse.max;
    return weighted(vexp(x), x);
  });
  return lse.log_sum - static_cast<float>(sum / lse.sum);
}

float mean_of(const float* z, int64_t n) {
  const double sum =
      sum_columns(n, [&](int64_t c, int64_t live) { return vload_part(z + c, live, 0.f); });
  return static_cast<float>(sum / static_cast<double>(n));
}

template <class D>
void write_gradient(const float* z, int64_t n, int64_t target, float lse, const Coefficients& k,
                    const Slope& slope, D* d) {
  const auto at = [&](vf x) {
    const vf logp = x - lse, p = vexp(logp);
    vf dz = vfma(vset(k.a), p, vset(k.c));
    if (k.e != 0.f) dz = vfma(vset(k.e), weighted(p, logp), dz);
    return dz;
  };
  for (int64_t c = 0; c < n; c += VL) {
    const vf x = vload_part(z + c, n - c, 0.f);
    store_part(d + c, at(x) * slope.at(x), n - c);
  }
  const vf x = vset(z[target]);
  store1(d + target, ((at(x) + k.b) * slope.at(x))[0]);
}

int64_t target_of(const LossRowsArgs& a, int64_t row) {
  return a.long_targets ? static_cast<const int64_t*>(a.targets)[row]
                        : static_cast<const int32_t*>(a.targets)[row];
}

// Losses of a row; gives its log-sum-exp.
float forward(const LossRowsArgs& a, int64_t row, const float* z, int64_t target, float* stats) {
  const bool inside = target >= 0 && target < a.columns;
  const RowLse r = row_lse(z, a.columns, stats);
  const bool valid = inside && is_valid(r);
  const float lse = lse_of(r), logprob = valid ? log_prob(r, z[target]) : __builtin_nanf("");
  a.lse[row] = lse;
  if (a.entropy) a.entropy[row] = is_valid(r) ? entropy_of(z, a.columns, r) : __builtin_nanf("");
  if (!a.is_loss) {
    a.out[row] = logprob;
    return lse;
  }
  float loss = -logprob;
  if (a.label_smoothing != 0.f)
    loss = loss * (1.f - a.label_smoothing) + a.label_smoothing * (lse - mean_of(z, a.columns));
  if (a.z_loss != 0.f) loss += a.z_loss * lse * lse;
  a.out[row] = loss;
  return lse;
}

Coefficients coefficients_of(const LossRowsArgs& a, int64_t row, float lse) {
  if (a.coefficients) {
    const float* k = a.coefficients + 4 * row;
    return {k[0], k[1], k[2], k[3]};
  }
  const float g = a.scale, smooth = a.label_smoothing;
  return {g * (1.f + 2.f * a.z_loss * lse), -g * (1.f - smooth),
          -g * (smooth / static_cast<float>(a.columns)), 0.f};
}

void one_row(const LossRowsArgs& a, int64_t row, float* stats) {
  float* z = a.logits + row * a.stride;
  const int64_t target = target_of(a, row);
  scale_row(z, a.columns, a.scaling);
  const float lse = a.given_lse ? a.given_lse[row] : forward(a, row, z, target, stats);
  if (!a.d) return;
  const Coefficients k = coefficients_of(a, row, lse);
  const Slope slope(a.scaling);
  dispatch_float(a.d_type, [&](auto t) {
    auto* d = static_cast<decltype(t)*>(a.d) + row * a.d_stride;
    if (target >= 0 && target < a.columns)
      write_gradient(z, a.columns, target, lse, k, slope, d);
    else
      __builtin_memset(d, 0, static_cast<size_t>(a.columns) * sizeof t);
  });
}

}  // namespace

void loss_rows(const LossRowsArgs& a, const Team& team) {
  const size_t bytes = static_cast<size_t>(divide_up(a.columns, kLseTile)) * 2 * sizeof(float);
  float* stats = static_cast<float*>(thread_scratch(Scratch::rows, bytes));
  for (int64_t row; (row = next_task(team)) < a.rows;) one_row(a, row, stats);
}

}  // namespace fastllm::FASTLLM_ISA
