// The router's kernel on the emulated device, against a double router and a stable sort. Its two
// halves run one after the other over all blocks, which is what the wait between them means.
//
// Usage: test_moe_gate quick | full
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/moe_gate_sort.cuh"
#include "paged_inputs.h"

using namespace fastllm;
using namespace fastllm::cuda;
using namespace fastllm::cuda::test;

namespace {

struct Route {
  int tokens, experts, k;
  bool sigmoid = false, biased = false, top2 = false, renormalize = false;
  int groups = 1, kept_groups = 1;
  int first = 0, slice = -1;  // slice -1: all experts
  bool ties = false, bad = false;
  double scale = 1.5;

  std::string name() const {
    return std::to_string(tokens) + " x " + std::to_string(experts) + " k " + std::to_string(k) +
           (sigmoid ? " sigmoid" : "") + (biased ? " bias" : "") + (top2 ? " top2" : "") +
           (renormalize ? " renormalized" : "") + " groups " + std::to_string(groups) + "/" +
           std::to_string(kept_groups) + (ties ? " ties" : "") + (bad ? " bad rows" : "");
  }
};

struct Result {
  std::vector<int32_t> ids, counts, offsets, slots;
  std::vector<float> weights, score_sum, z;
  bool operator==(const Result& r) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), 4 * a.size()));
    };
    return ids == r.ids && counts == r.counts && offsets == r.offsets && slots == r.slots &&
           same(weights, r.weights) && same(score_sum, r.score_sum) && same(z, r.z);
  }
};

template <class V>
std::vector<V> values(const Owned& t) {
  return {t.as<V>(), t.as<V>() + t.bytes / sizeof(V)};
}

struct RouteInputs {
  Owned logits, bias;
};

// Choices lie 1e-4 apart or are equal, at uneven distances: sums of two are not equal by chance.
RouteInputs make(const Route& r, uint64_t seed) {
  Random random(seed + static_cast<uint64_t>(r.tokens * 1000 + r.experts));
  RouteInputs in{Owned(DType::f32, {r.tokens, r.experts + 3}), Owned(DType::f32, {r.experts})};
  in.logits.view.shape[1] = r.experts;
  float* bias = in.bias.as<float>();
  for (int e = 0; e < r.experts; ++e) bias[e] = r.ties ? 0.f : 0.2f * random.value();
  for (int t = 0; t < r.tokens; ++t) {
    float* row = in.logits.as<float>() + t * (r.experts + 3);
    std::vector<int> order(static_cast<size_t>(r.experts));
    for (int e = 0; e < r.experts; ++e) order[static_cast<size_t>(e)] = e;
    for (int e = r.experts - 1; e > 0; --e)
      std::swap(order[static_cast<size_t>(e)], order[random.bits() % static_cast<uint32_t>(e + 1)]);
    for (int e = 0; e < r.experts; ++e) {
      const double place =
          0.3 + 0.4 * std::pow((order[static_cast<size_t>(e)] + 0.5) / r.experts, 1.3);
      if (r.ties)
        row[e] = static_cast<float>(static_cast<int>(random.bits() % 5) - 2);
      else if (r.sigmoid && r.biased)
        row[e] = static_cast<float>(std::log((place - bias[e]) / (1 - (place - bias[e]))));
      else
        row[e] = static_cast<float>(8 * place) + 1e-3f * random.value() / r.experts;
    }
  }
  if (r.bad && r.tokens > 20) {
    in.logits.as<float>()[0] = NAN;
    in.logits.as<float>()[17 * (r.experts + 3) + r.experts - 1] = INFINITY;
    for (int e = 0; e < r.experts; ++e) in.logits.as<float>()[19 * (r.experts + 3) + e] = -INFINITY;
  }
  if (r.bad && !r.sigmoid && r.tokens > 1)
    for (int e = 0; e + 2 < r.experts; e += 2) in.logits.as<float>()[r.experts + 3 + e] = -INFINITY;
  return in;
}

Result run(const Route& r, const RouteInputs& in, emulated::Options options) {
  emulated::Device& d = emulated::device();
  d.options = options;
  d.readable.clear();
  d.writable.clear();
  const int slice = r.slice < 0 ? r.experts : r.slice;
  Owned ids(DType::i32, {r.tokens, r.k}), weights(DType::f32, {r.tokens, r.k});
  Owned counts(DType::i32, {r.experts}), scores(DType::f32, {r.experts}), z(DType::f32, {});
  Owned offsets(DType::i32, {slice + 1}), slots(DType::i32, {r.tokens * r.k});
  Owned scratch(DType::f32, {gate_scratch(r.tokens, r.experts)});
  const MoeGateCall call =
      moe_gate_call(weights.view, ids.view, counts.view, scores.view, z.view, offsets.view,
                    slots.view, scratch.view, in.logits.view, r.biased ? in.bias.view : Tensor{},
                    r.sigmoid, r.groups, r.kept_groups, r.top2, r.renormalize, r.scale, r.first);
  for (const Owned* t : {&ids, &weights, &counts, &scores, &z, &offsets, &slots, &scratch})
    d.allow(t->memory.get(), t->bytes, true);
  d.allow(in.logits.memory.get(), in.logits.bytes, false);
  d.allow(in.bias.memory.get(), in.bias.bytes, false);
  const emulated::Index grid{static_cast<unsigned>(call.blocks), 1, 1};
  const auto shared = static_cast<size_t>(call.p.shared.bytes);
  visit_gate(call, [&](auto v) {
    emulated::launch(grid, kGateThreads, shared, [&] { gate_rows<decltype(v)::value>(call.p); });
  });
  emulated::launch(grid, kGateThreads, shared, [&] { sort_slots(call.p); });
  return {values<int32_t>(ids),   values<int32_t>(counts), values<int32_t>(offsets),
          values<int32_t>(slots), values<float>(weights),  values<float>(scores),
          values<float>(z)};
}

struct Exact {
  std::vector<int> ids;
  std::vector<double> scores, p;
  double lse = 0;
};

Exact exact_row(const Route& r, const RouteInputs& in, int token) {
  const float* x = in.logits.as<float>() + token * (r.experts + 3);
  const auto n = static_cast<size_t>(r.experts);
  Exact out;
  double top = -INFINITY, sum = 0, total = 0;
  for (int e = 0; e < r.experts; ++e) {
    if (std::isnan(x[e])) return out;
    top = std::max<double>(top, x[e]);
  }
  if (std::isinf(top)) return out;
  for (int e = 0; e < r.experts; ++e) sum += std::exp(x[e] - top);
  out.lse = top + std::log(sum);
  std::vector<std::pair<double, int>> choice;
  for (int e = 0; e < r.experts; ++e) {
    const double s =
        r.sigmoid ? 1 / (1 + std::exp(-static_cast<double>(x[e]))) : std::exp(x[e] - top) / sum;
    out.scores.push_back(s);
    total += s;
    choice.push_back({-(s + (r.biased ? in.bias.as<float>()[e] : 0.f)), e});
  }
  for (double s : out.scores) out.p.push_back(s / total);
  const int size = r.experts / r.groups;
  std::vector<std::pair<double, int>> groups;
  for (int g = 0; g < r.groups; ++g) {
    auto own = std::vector(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    std::sort(own.begin(), own.end());
    groups.push_back({own[0].first + (r.top2 && r.groups > 1 ? own[1].first : 0), g});
  }
  std::sort(groups.begin(), groups.end());
  std::vector<bool> kept(n);
  for (int j = 0; j < r.kept_groups; ++j)
    for (int i = 0; i < size; ++i)
      kept[static_cast<size_t>(groups[static_cast<size_t>(j)].second * size + i)] = true;
  std::sort(choice.begin(), choice.end());
  for (const auto& [value, e] : choice)
    if (kept[static_cast<size_t>(e)] && static_cast<int>(out.ids.size()) < r.k)
      out.ids.push_back(e);
  return out;
}

void judge_slots(const Route& r, const Result& got) {
  const int slice = r.slice < 0 ? r.experts : r.slice;
  size_t next = 0;
  for (int e = 0; e < slice; ++e) {
    REQUIRE(got.offsets[static_cast<size_t>(e)] == static_cast<int32_t>(next), "%s: offset %d",
            r.name().c_str(), e);
    for (size_t s = 0; s < got.ids.size(); ++s)
      if (got.ids[s] == r.first + e)
        REQUIRE(got.slots[next++] == static_cast<int32_t>(s), "%s: slot", r.name().c_str());
  }
  REQUIRE(got.offsets[static_cast<size_t>(slice)] == static_cast<int32_t>(next), "%s: last offset",
          r.name().c_str());
  for (; next < got.slots.size(); ++next)
    REQUIRE(got.slots[next] == -1, "%s: a row of nobody", r.name().c_str());
}

double judge(const Route& r, const RouteInputs& in, const Result& got) {
  double worst = 0, z = 0;
  const auto near = [&](double value, double want, double bound, const char* what) {
    REQUIRE(std::fabs(value - want) <= bound, "%s: %s is %g, not %g", r.name().c_str(), what, value,
            want);
    worst = std::max(worst, std::fabs(value - want) / bound);
  };
  std::vector<double> sums(static_cast<size_t>(r.experts));
  std::vector<int32_t> counts(static_cast<size_t>(r.experts));
  for (int t = 0; t < r.tokens; ++t) {
    const Exact row = exact_row(r, in, t);
    double total = 0;
    for (int e : row.ids) total += row.scores[static_cast<size_t>(e)];
    for (int j = 0; j < r.k; ++j) {
      const auto at = static_cast<size_t>(t * r.k + j);
      const int id = row.ids.empty() ? -1 : row.ids[static_cast<size_t>(j)];
      REQUIRE(got.ids[at] == id, "%s: token %d slot %d: %d, not %d", r.name().c_str(), t, j,
              got.ids[at], id);
      const double score = id < 0 ? 0 : row.scores[static_cast<size_t>(id)];
      near(got.weights[at], r.scale * score / (r.renormalize && id >= 0 ? total : 1), 2e-6,
           "weight");
      if (id >= 0) ++counts[static_cast<size_t>(id)];
    }
    if (row.ids.empty()) continue;
    for (size_t e = 0; e < sums.size(); ++e) sums[e] += row.p[e];
    z += row.lse * row.lse;
  }
  REQUIRE(got.counts == counts, "%s: counts", r.name().c_str());
  for (size_t e = 0; e < sums.size(); ++e)
    near(got.score_sum[e], sums[e], 2e-6 * (1 + sums[e]), "score sum");
  near(got.z[0], z, 2e-6 * (1 + z), "z sum");
  judge_slots(r, got);
  return worst;
}

int cases = 0;
double worst = 0;

void check_case(const Route& r) {
  const RouteInputs in = make(r, 7);
  const Result first = run(r, in, {});
  worst = std::max(worst, judge(r, in, first));
  if (cases % 4 == 0)
    REQUIRE(run(r, in, {false, true}) == first, "%s: the order of warps changes bits",
            r.name().c_str());
  // A token's own results have the same bits alone.
  if (r.tokens > 1 && cases % 3 == 0) {
    Route one = r;
    one.tokens = 1;
    one.bad = false;
    RouteInputs alone = make(one, 7);
    const int last = r.tokens - 1;
    std::memcpy(alone.logits.as<float>(), in.logits.as<float>() + last * (r.experts + 3),
                static_cast<size_t>(4 * r.experts));
    std::memcpy(alone.bias.as<float>(), in.bias.as<float>(), in.bias.bytes);
    const Result got = run(one, alone, {});
    for (int j = 0; j < r.k; ++j) {
      const auto at = static_cast<size_t>(last * r.k + j), own = static_cast<size_t>(j);
      REQUIRE(got.ids[own] == first.ids[at] &&
                  std::memcmp(&got.weights[own], &first.weights[at], 4) == 0,
              "%s: a token depends on others", r.name().c_str());
    }
  }
  ++cases;
}

Route routing(int kind, int tokens, int experts, int k) {
  Route r{tokens, experts, k};
  const bool grouped = experts % 4 == 0 && experts >= 8 && k <= experts / 2;
  switch (kind) {
    case 0: break;
    case 1: r.renormalize = true; break;
    case 2: r.groups = grouped ? 4 : 1, r.kept_groups = grouped ? 2 : 1; break;
    case 3:
      r.sigmoid = r.biased = r.renormalize = r.top2 = true;
      r.groups = grouped ? 4 : 1, r.kept_groups = grouped ? 2 : 1;
      break;
    case 4: r.ties = r.biased = true, r.sigmoid = true; break;
    case 5: r.bad = true, r.renormalize = true; break;
    case 6: r.ties = true, r.groups = grouped ? 4 : 1, r.kept_groups = grouped ? 2 : 1; break;
    default:
      r.first = experts / 4;
      r.slice = experts / 2;
      break;
  }
  return r;
}

void all_cases(bool full) {
  const int tokens[] = {1, 0, 33, 16, 17, 5, 70}, experts[] = {8, 64, 1, 160, 256, 33, 512, 24};
  const int slots[] = {2, 8, 1, 6, 16, 3};
  int i = 0;
  for (int e : experts)
    for (int kind = 0; kind < 8; ++kind)
      for (int t = 0; t < (full ? 7 : 1); ++t, ++i)
        check_case(routing(kind, tokens[full ? t : i % 7], e, std::min(e, slots[(i / 3) % 6])));
  for (int kind = 0; kind < 8; kind += full ? 1 : 4) check_case(routing(kind, 1100, 32, 4));
  if (full) check_case(routing(1, 4096, 64, 8));
}

}  // namespace

int main(int argc, char** argv) {
  all_cases(argc > 1 && std::string(argv[1]) == "full");
  std::printf("%d cases, at most %.2f of the bound\n", cases, worst);
}
