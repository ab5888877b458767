// The router and its gradient: against the definition in double, at sizes that fit no vector.
#include "harness.h"

namespace fastllm::test {
namespace {

struct Routing {
  bool sigmoid, biased;
  int64_t groups, kept_groups;
  bool top2, renormalize;
};
constexpr Routing kRoutings[] = {{false, false, 1, 1, false, true},
                                 {false, false, 4, 2, false, false},
                                 {true, true, 4, 2, true, true},
                                 {true, false, 1, 1, false, false},
                                 {false, true, 2, 2, false, true}};

// Scores of a row, scores that add up to 1, and its log-sum-exp.
struct Scores {
  std::vector<double> s, p;
  double lse;
};

Scores scores_of(const Owned& logits, int64_t row, int64_t n, bool sigmoid) {
  Scores out{std::vector<double>(n), std::vector<double>(n), 0};
  double sum = 0, total = 0;
  for (int64_t e = 0; e < n; ++e) sum += std::exp(logits.get(row * n + e));
  out.lse = std::log(sum);
  for (int64_t e = 0; e < n; ++e) {
    const double x = logits.get(row * n + e);
    out.s[e] = sigmoid ? 1 / (1 + std::exp(-x)) : std::exp(x) / sum;
    total += out.s[e];
  }
  for (int64_t e = 0; e < n; ++e) out.p[e] = out.s[e] / total;
  return out;
}

// Every expert of a kept group has a choice of at most the last chosen one, but for those chosen.
void check_row(const Routing& r, const Scores& scores, const Owned& bias, const int32_t* ids,
               int64_t n, int64_t k) {
  const int64_t size = n / r.groups;
  const auto choice = [&](int64_t e) { return scores.s[e] + (r.biased ? bias.get(e) : 0.f); };
  std::vector<std::pair<double, int64_t>> groups;
  for (int64_t g = 0; g < r.groups; ++g) {
    std::vector<double> own;
    for (int64_t i = 0; i < size; ++i) own.push_back(-choice(g * size + i));
    std::sort(own.begin(), own.end());
    groups.push_back({r.top2 ? own[0] + own[1] : own[0], g});
  }
  std::sort(groups.begin(), groups.end());
  std::vector<bool> kept(r.groups), chosen(n);
  for (int64_t i = 0; i < r.kept_groups; ++i) kept[groups[i].second] = true;
  for (int64_t j = 0; j < k; ++j) {
    CHECK(ids[j] >= 0 && ids[j] < n && !chosen[ids[j]] && kept[ids[j] / size]);
    if (j) CHECK(choice(ids[j]) <= choice(ids[j - 1]) + 1e-6);
    chosen[ids[j]] = true;
  }
  for (int64_t e = 0; e < n; ++e)
    CHECK(chosen[e] || !kept[e / size] || choice(e) <= choice(ids[k - 1]) + 1e-6);
}

void gate(Random& random, const Routing& r, int64_t tokens, int64_t n, int64_t k) {
  Owned logits = random.tensor(DType::f32, {tokens, n}, 4), bias = random.tensor(DType::f32, {n});
  Owned ids(DType::i32, {tokens, k}), weights(DType::f32, {tokens, k}), counts(DType::i32, {n});
  Owned score_sum(DType::f32, {n}), z_sum(DType::f32, {}),
      partial(DType::f32, {moe_gate_scratch(tokens, n)});
  std::vector<Scores> rows;
  for (int64_t t = 0; t < tokens; ++t) rows.push_back(scores_of(logits, t, n, r.sigmoid));
  const auto judge = [&] {
    double z = 0;
    std::vector<double> sums(n);
    std::vector<int32_t> count(n);
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t* chosen = ids.view.as<int32_t>() + t * k;
      check_row(r, rows[t], bias, chosen, n, k);
      double total = 0;
      for (int64_t j = 0; j < k; ++j) total += rows[t].s[chosen[j]], ++count[chosen[j]];
      for (int64_t j = 0; j < k; ++j) {
        const double want = 1.5 * rows[t].s[chosen[j]] / (r.renormalize ? total : 1);
        CHECK(std::fabs(weights.get(t * k + j) - want) < 1e-5);
      }
      for (int64_t e = 0; e < n; ++e) sums[e] += rows[t].p[e];
      z += rows[t].lse * rows[t].lse;
    }
    for (int64_t e = 0; e < n; ++e) {
      CHECK(counts.view.as<int32_t>()[e] == count[e]);
      CHECK(std::fabs(score_sum.get(e) - sums[e]) < 1e-5 * (1 + sums[e]));
    }
    CHECK(std::fabs(z_sum.get(0) - z) < 1e-5 * (1 + z));
  };
  run_everywhere("moe_gate", &Kernels::moe_gate,
                 moe_gate_args(weights, ids, counts, score_sum, z_sum, partial, logits,
                               r.biased ? Tensor(bias) : Tensor(), r.sigmoid, r.groups,
                               r.kept_groups, r.top2, r.renormalize, 1.5),
                 {&ids, &weights, &counts, &score_sum, &z_sum}, 1e-5f, judge);
}

// The gradient against differences of the loss.
void gradient(Random& random, const Routing& r, int64_t tokens, int64_t n, int64_t k) {
  Owned logits = random.tensor(DType::f32, {tokens, n}, 2),
        d = random.tensor(DType::f32, {tokens, k});
  Owned d_sum = random.tensor(DType::f32, {n}), d_z = random.tensor(DType::f32, {});
  Owned ids(DType::i32, {tokens, k}), dlogits(DType::f32, {tokens, n});
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < k; ++j)
      ids.view.as<int32_t>()[t * k + j] = static_cast<int32_t>((t + 3 * j) % n);
  if (tokens > 1)
    for (int64_t j = 0; j < k; ++j) ids.view.as<int32_t>()[k + j] = -1;
  const auto loss = [&](int64_t t) {
    const Scores row = scores_of(logits, t, n, r.sigmoid);
    const int32_t* chosen = ids.view.as<int32_t>() + t * k;
    double total = 0, value = d_z.get(0) * row.lse * row.lse;
    for (int64_t j = 0; j < k; ++j) total += row.s[chosen[j]];
    for (int64_t j = 0; j < k; ++j)
      value += 1.5 * d.get(t * k + j) * row.s[chosen[j]] / (r.renormalize ? total : 1);
    for (int64_t e = 0; e < n; ++e) value += d_sum.get(e) * row.p[e];
    return value;
  };
  const auto judge = [&] {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t e = 0; e < n; e += 3) {
        const float x = logits.get(t * n + e), step = 1.f / 1024;
        double want = 0;
        if (ids.view.as<int32_t>()[t * k] >= 0) {
          logits.set(t * n + e, x + step);
          want = loss(t);
          logits.set(t * n + e, x - step);
          want = (want - loss(t)) / (2 * step);
          logits.set(t * n + e, x);
        }
        CHECK(std::fabs(dlogits.get(t * n + e) - want) < 1e-3);
      }
  };
  run_everywhere(
      "moe_gate_backward", &Kernels::moe_gate_backward,
      moe_gate_backward_args(dlogits, logits, ids, d, d_sum, d_z, r.sigmoid, r.renormalize, 1.5),
      {&dlogits}, 1e-5f, judge);
}

}  // namespace

void test_moe_gate() {
  Random random(11);
  for (const Routing& r : kRoutings)
    for (int64_t tokens : {0, 1, 33, 70}) {
      gate(random, r, tokens, 8, 2);
      gate(random, r, tokens, 52, 7);
      gate(random, r, tokens < 2 ? tokens : 3, 256, 16);
      gradient(random, r, tokens < 5 ? tokens : 5, 24, 3);
    }
  gate(random, kRoutings[0], 4, 1, 1);
  gradient(random, kRoutings[3], 3, 129, 9);
}

}  // namespace fastllm::test
