// The paged attention kernels of csrc/cuda on the emulated device, against float64. The bound of
// every element is what the definition rounds: P and the output to q's dtype, nothing else.
//
// Usage: test_paged_attention quick | full | shared
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/paged_attention_instances.cuh"
#include "paged_inputs.h"

using namespace fastllm;
using namespace fastllm::cuda;
using namespace fastllm::cuda::test;

namespace {

// Runs both kernels; the output's bits.
std::vector<uint16_t> run(const Inputs& in, emulated::Options options) {
  const Case& c = in.c;
  emulated::Device& d = emulated::device();
  d.options = options;
  d.readable.clear();
  d.writable.clear();
  Owned o(c.dtype, {in.tokens, c.heads, c.value_dim});
  const int64_t splits = divided(in.width * c.page, kSplit);
  Owned partials(DType::f32, {splits * in.tokens * c.heads * (c.value_dim + 2)});
  const Tensor none;
  const PagedAttentionCall call = paged_attention_call(
      o.view, in.q->view, in.k->view, in.v->view, in.table->view, in.starts->view, in.lengths->view,
      in.given(in.k_scales), in.given(in.v_scales), in.given(in.sinks), partials.view,
      1.0 / std::sqrt(c.dim), c.window, c.softcap);
  d.allow(o.memory.get(), o.bytes, true);
  d.allow(partials.memory.get(), partials.bytes, true);
  for (const auto* t : {&in.q, &in.k, &in.v, &in.k_scales, &in.v_scales, &in.sinks, &in.table,
                        &in.starts, &in.lengths})
    if (*t) d.allow((*t)->memory.get(), (*t)->bytes, false);
  if (in.tokens == 0) return {};
  const auto index = [](GridSize g) { return emulated::Index{g.x, g.y, g.z}; };
  visit_instance(call, [&](auto instance) {
    using I = decltype(instance);
    const PagedAttentionParams& p = call.p;
    emulated::launch(index(split_grid(call)), kThreads, static_cast<size_t>(p.shared.bytes), [&] {
      split_kernel<typename I::T, I::kCodes, I::kGroups, I::kAlias, kStages>(p);
    });
    if (p.partials)
      emulated::launch(index(combine_grid(call)), kThreads, 0,
                       [&] { combine_kernel<typename I::T>(p); });
  });
  return {o.as<uint16_t>(), o.as<uint16_t>() + o.bytes / 2};
}

// The largest error over its bound. Rounding P to q's dtype moves an output by at most u times the
// mean of |v|, the output's own rounding by u |o|; fp32 sums, exp2 and the logits add a little.
double judge(const Inputs& in, const std::vector<uint16_t>& got) {
  const Case& c = in.c;
  const double unit = c.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
  const double smallest = c.dtype == DType::bf16 ? 0 : 0x1p-25;  // half a step of subnormals
  double worst = 0;
  const int group = c.heads / c.kv_heads;
  for (size_t s = 0; s < c.fresh.size(); ++s)
    for (int i = 0; i < c.fresh[s]; ++i)
      for (int h = 0; h < c.heads; ++h) {
        const int token = in.starts->as<int32_t>()[s] + i;
        const int last = c.cached[s] - c.fresh[s] + i;
        const int first = c.window < 0 ? 0 : std::max(0, last - c.window);
        const int kv = h / group;
        std::vector<double> p, scale;
        double top = -HUGE_VAL;
        std::vector<int> seen;
        for (int j = first; j <= last && c.cached[s] > 0; ++j) {
          const int64_t page = in.table->as<int32_t>()[static_cast<int>(s) * in.width + j / c.page];
          if (page < 0 || page >= in.pages) continue;
          seen.push_back(j);
          double sum = 0;
          const size_t row = static_cast<size_t>(j * c.kv_heads + kv);
          for (int d = 0; d < c.dim; ++d)
            sum += static_cast<double>(
                       in.queries[static_cast<size_t>((token * c.heads + h) * c.dim + d)]) *
                   in.keys[s][row * static_cast<size_t>(c.dim) + static_cast<size_t>(d)];
          double value_scale = 1;
          if (c.codes) {
            const int64_t at = (page * c.kv_heads + kv) * c.page + j % c.page;
            sum *= in.k_scales->as<float>()[at];
            value_scale = in.v_scales->as<float>()[at];
          }
          sum /= std::sqrt(c.dim);
          if (c.softcap > 0) sum = c.softcap * std::tanh(sum / c.softcap);
          p.push_back(sum);
          scale.push_back(value_scale);
          top = std::max(top, sum);
        }
        double total = 0;
        for (double& x : p) total += x = std::exp(x - top);
        if (c.sinks && !p.empty()) total += std::exp(in.sinks->as<float>()[h] - top);
        for (int d = 0; d < c.value_dim; ++d) {
          double want = 0, bound = 0;
          for (size_t j = 0; j < p.size(); ++j) {
            const size_t row = static_cast<size_t>(seen[j] * c.kv_heads + kv);
            const double v =
                in.values[s][row * static_cast<size_t>(c.value_dim) + static_cast<size_t>(d)];
            want += p[j] * scale[j] * v;
            bound += ((unit + 2e-5) * p[j] * scale[j] + smallest) * std::fabs(v);
          }
          if (!p.empty()) want /= total, bound /= total;
          bound += unit * std::fabs(want) + smallest;
          const size_t at = static_cast<size_t>((token * c.heads + h) * c.value_dim + d);
          const double error = std::fabs(float_of(c.dtype, got[at]) - want);
          const double ratio = bound == 0 ? (error == 0 ? 0 : HUGE_VAL) : error / bound;
          REQUIRE(ratio <= 1.0, "%s: token %d head %d column %d: %g, float64 gives %g",
                  c.name().c_str(), token, h, d, float_of(c.dtype, got[at]), want);
          worst = std::max(worst, ratio);
        }
      }
  return worst;
}

struct Counts {
  int cases = 0, runs = 0;
  double worst = 0;
} counts;

// One case: the error, then the same bits with copies late, warps in the other order, and the pages
// elsewhere.
void check_case(const Case& c, bool all_orders) {
  const uint64_t seed = 5;
  const Inputs in = make_inputs(c, seed);
  const int start = counts.cases % 4;
  const std::vector<uint16_t> first = run(in, {start % 2 == 1, start / 2 == 1});
  counts.worst = std::max(counts.worst, judge(in, first));
  ++counts.cases;
  ++counts.runs;
  for (int order = 1; order < 4 && all_orders; ++order) {
    const int at = (start + order) % 4;
    REQUIRE(run(in, {at % 2 == 1, at / 2 == 1}) == first, "%s: an order changes the bits",
            c.name().c_str());
    ++counts.runs;
  }
}

// A sequence's rows have the same bits alone as in the batch, whatever the table's width.
void check_alone(const Case& c) {
  const std::vector<uint16_t> all = run(make_inputs(c, 5), {});
  size_t at = 0;
  for (size_t s = 0; s < c.fresh.size(); ++s) {
    Case one = c;
    one.fresh = {c.fresh[s]};
    one.cached = {c.cached[s]};
    one.spare_pages = 1024 / c.page;
    const std::vector<uint16_t> alone = run(make_inputs(one, 5), {true, true});
    REQUIRE(std::equal(alone.begin(), alone.end(), all.begin() + static_cast<int64_t>(at)),
            "%s: sequence %zu alone has other bits", c.name().c_str(), s);
    at += alone.size();
    ++counts.runs;
  }
}

// Tokens one by one have the bits that they have together.
void check_chunks(const Case& c) {
  Inputs in = make_inputs(c, 5);
  const std::vector<uint16_t> all = run(in, {});
  const int tokens = in.tokens;
  auto* first = in.q->as<uint16_t>();
  in.tokens = 1;
  in.q->view.shape[0] = 1;
  in.starts->as<int32_t>()[1] = 1;
  for (int i = 0; i < tokens; ++i) {
    in.lengths->as<int32_t>()[0] = c.cached[0] - tokens + i + 1;
    in.q->view.data = first + i * in.q->view.stride[0];
    const std::vector<uint16_t> one = run(in, {});
    REQUIRE(std::equal(one.begin(), one.end(), all.begin() + i * static_cast<int64_t>(one.size())),
            "%s: token %d alone has other bits", c.name().c_str(), i);
    ++counts.runs;
  }
}

// Lengths, starts and pages that lie: nothing outside the tensors is touched (the device checks).
void check_hostile(bool codes) {
  const int huge = 2147483647;
  const std::vector<std::vector<int>> tables = {
      {huge, -1, 3}, {-huge - 1, 7, 9}, {0, 1, 2}, {1000, 1001, -5}};
  for (const std::vector<int>& table : tables)
    for (const int length : {huge, -5, 2, 190, 130, 0})
      for (const std::vector<int>& starts :
           {std::vector<int>{0, 3}, {0, huge}, {-huge, 2}, {3, 0}, {2, 3}}) {
        Case c;
        c.codes = codes;
        c.fresh = {3};
        c.cached = {192};
        c.spare_pages = 0;
        c.window = counts.runs % 2 ? 70 : -1;
        Inputs in = make_inputs(c, 1);
        std::copy(table.begin(), table.end(), in.table->as<int32_t>());
        std::copy(starts.begin(), starts.end(), in.starts->as<int32_t>());
        in.lengths->as<int32_t>()[0] = length;
        run(in, {});
        ++counts.runs;
      }
}

// Positions whose page the table does not have are not seen; 33 splits are merged in two rounds.
void check_far_and_missing() {
  Case c;
  c.heads = 2;
  c.dim = 16;
  c.value_dim = 8;
  c.fresh = {1, 2};
  c.cached = {17000, 700};
  c.rise = 32 * kSplit;
  check_case(c, false);
  for (const bool codes : {false, true}) {
    c.codes = codes;
    c.value_dim = 16;
    c.fresh = {1, 2};
    c.cached = {400, 700};
    Inputs in = make_inputs(c, 9);
    in.table->as<int32_t>()[2] = -1;
    in.table->as<int32_t>()[in.width + 9] = in.pages;
    counts.worst = std::max(counts.worst, judge(in, run(in, {})));
    ++counts.cases;
    ++counts.runs;
  }
}

// No tokens, no sequences, a table without columns: nothing to do, or zeros.
void check_empty() {
  Case c;
  c.fresh = {0, 0};
  c.cached = {5, 0};
  run(make_inputs(c, 1), {});
  c.fresh = {};
  c.cached = {};
  run(make_inputs(c, 1), {});
  c.fresh = {1};
  c.cached = {0};
  c.spare_pages = 0;
  for (const uint16_t x : run(make_inputs(c, 1), {})) REQUIRE(x == 0, "not zero");
  counts.runs += 3;
}

// A NaN in one query stays in its row.
void check_nan_query() {
  Case c;
  c.fresh = {3, 1};
  c.cached = {70, 600};
  Inputs in = make_inputs(c, 3);
  const std::vector<uint16_t> clean = run(in, {});
  in.q->as<uint16_t>()[in.q->view.stride[0] + 2 * in.q->view.stride[1] + 5] = 0x7fff;
  const std::vector<uint16_t> got = run(in, {});
  for (int i = 0; i < static_cast<int>(got.size()); ++i) {
    const bool poisoned = i / c.value_dim == 1 * c.heads + 2;
    const uint16_t bits = got[static_cast<size_t>(i)];
    REQUIRE(poisoned ? std::isnan(float_of(c.dtype, bits)) : bits == clean[static_cast<size_t>(i)],
            "element %d", i);
  }
  counts.runs += 2;
}

struct Lengths {
  std::vector<int> fresh, cached;
};
const std::vector<Lengths> kLengths = {
    {{1, 1, 1, 1}, {63, 0, 64, 65}},   // one split, a dead slot
    {{1, 1, 1}, {511, 512, 513}},      // around the border of a split
    {{1, 1}, {1, 1100}},               // three splits
    {{3, 0, 2, 20}, {600, 5, 2, 70}},  // several tokens, more rows than a tile holds
};
struct Variant {
  int window;
  float softcap;
  bool sinks;
};
const std::vector<Variant> kVariants = {{-1, 0, false}, {37, 0, true}, {600, 5, false},
                                        {0, 0, false},  {-1, 5, true}, {-1, 0, true}};

Case make_case(int heads, int kv_heads, int dim, int value_dim, const Lengths& lengths,
               const Variant& variant, DType dtype, bool codes, int page) {
  Case c;
  c.dtype = dtype;
  c.codes = codes;
  c.heads = heads;
  c.kv_heads = kv_heads;
  c.dim = dim;
  c.value_dim = value_dim;
  c.page = page;
  c.fresh = lengths.fresh;
  c.cached = lengths.cached;
  c.window = variant.window;
  c.softcap = variant.softcap;
  c.sinks = variant.sinks;
  return c;
}

// Every group size, head dim and element type; lengths, variants and pages take turns (quick), or
// all of them meet (full).
void all_cases(bool full) {
  const std::vector<std::vector<int>> groups = {{3, 3}, {3, 1}, {8, 2}, {7, 1}, {8, 1}, {16, 1}};
  const std::vector<std::vector<int>> dims = {{64, 64},   {80, 80},  {128, 128}, {192, 128},
                                              {256, 256}, {96, 112}, {40, 24},   {16, 8}};
  const int pages[] = {16, 64, 48, 128};
  size_t i = 0;
  for (const auto& dim : dims)
    for (const auto& group : groups)
      for (const bool codes : {false, true})
        for (const DType dtype : {DType::bf16, DType::f16}) {
          if (codes && (dim[0] % 16 || dim[1] % 16)) continue;
          ++i;
          if (!full && i % 3 != 0) continue;
          for (size_t l = 0; l < (full ? kLengths.size() : 1); ++l)
            for (size_t v = 0; v < (full ? kVariants.size() : 1); ++v)
              check_case(make_case(group[0], group[1], dim[0], dim[1],
                                   kLengths[(i / 3 + l) % kLengths.size()],
                                   kVariants[(i / 5 + v) % kVariants.size()], dtype, codes,
                                   pages[(i / 2 + l + v) % 4]),
                         counts.cases % 16 == 0);
        }
}

// Values that are the first columns of the keys: one copy serves both products.
void aliased_cases(bool full) {
  for (const auto& dim : std::vector<std::vector<int>>{{576, 512}, {96, 64}, {192, 128}})
    for (const DType dtype : {DType::bf16, DType::f16})
      for (const Lengths& lengths : kLengths) {
        if (!full && dim[0] == 576 && dtype == DType::f16) continue;
        Case c =
            make_case(full ? 20 : 3, 1, dim[0], dim[1], lengths, kVariants[0], dtype, false, 64);
        c.alias = true;
        check_case(c, true);
      }
}

// Prints "cache D Dv bytes": the shared memory of a block.
void print_shared() {
  const int dims[][3] = {{64, 64, 0}, {128, 128, 0}, {192, 128, 0}, {256, 256, 0}, {576, 512, 1}};
  for (const auto& [dim, value_dim, alias] : dims)
    for (const int element : {2, 1}) {
      if (alias && element == 1) continue;
      PagedAttentionParams p{};
      p.dim = dim;
      p.value_dim = value_dim;
      p.k_steps = static_cast<int32_t>(round_up(dim, element == 1 ? 32 : 16) / 16);
      std::printf("%s %d %d %d\n", element == 1 ? "int8" : "half", dim, value_dim,
                  shared_layout(p, element, kStages, alias).bytes);
    }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc == 2 ? argv[1] : "";
  REQUIRE(mode == "quick" || mode == "full" || mode == "shared", "usage: quick | full | shared");
  if (mode == "shared") {
    print_shared();
    return 0;
  }
  const bool full = mode == "full";
  all_cases(full);
  aliased_cases(full);
  for (const bool codes : {false, true}) {
    for (const Lengths& lengths : kLengths) {
      const Case c = make_case(8, 2, 80, 80, lengths, kVariants[1], DType::bf16, codes, 16);
      check_case(c, true);
      check_alone(c);
    }
    check_hostile(codes);
    // The second window ends where the tile from 64 on is whole for the first token only.
    for (const int window : {-1, 534, 130})
      check_chunks(
          make_case(8, 2, 64, 64, {{9}, {606}}, {window, 0, false}, DType::bf16, codes, 32));
  }
  check_far_and_missing();
  check_nan_query();
  check_empty();
  std::printf("%d cases, %d runs, %lld blocks, %lld products; largest error %.2f of its bound\n",
              counts.cases, counts.runs, static_cast<long long>(emulated::device().blocks_run),
              static_cast<long long>(emulated::device().products), counts.worst);
}
