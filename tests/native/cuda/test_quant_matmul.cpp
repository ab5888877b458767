// The low-batch product with packed weights on the emulated device, against double sums of exact
// weights.
//
// Usage: test_quant_matmul quick | full
#include <cmath>
#include <string>
#include <vector>

#include "cuda/quant_matmul_rows.cuh"
#include "paged_inputs.h"

using namespace fastllm;
using namespace fastllm::cuda;
using namespace fastllm::cuda::test;

namespace {

struct Problem {
  Format format;
  int m, n, k;
  bool bias = false, half_bias = false, half_y = false;
  std::string name() const {
    return "format " + std::to_string(static_cast<int>(format)) + ": " + std::to_string(m) + " x " +
           std::to_string(n) + " x " + std::to_string(k);
  }
};

struct Inputs {
  Owned data, scales, x, bias;
  std::vector<double> weight;  // [n, k]
};

float half(float x) { return from_half<Fp16>(to_half<Fp16>(x)); }

double e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return byte & 0x80 ? -size : size;
}

constexpr double kNf4[16] = {-1.0,          -0.6953125,    -0.5234375,    -0.39453125,
                             -0.28515625,   -0.1845703125, -0.0908203125, 0.0,
                             0.07958984375, 0.1611328125,  0.24609375,    0.337890625,
                             0.44140625,    0.5625,        0.72265625,    1.0};

// The code of a column of a row's block, as fastllm/ops/packed_layout.py says.
double code_of(Format format, const uint8_t* block, int column) {
  if (layout_of(format).words == 8) {
    if (format == Format::fp8 || format == Format::fp8_block) return e4m3(block[column]);
    return static_cast<int8_t>(block[column]);
  }
  const int u = block[column % 16] >> (column / 16 * 4) & 15;
  switch (format) {
    case Format::nf4:
    case Format::nf4_dq: return kNf4[u];
    case Format::q4_1:
    case Format::q4_k:
    case Format::int4_asym_g32:
    case Format::int4_asym_g64:
    case Format::int4_asym_g128: return u;
    default: return u - 8;
  }
}

// Writes random scales of a row and gives d and m of every block of 32 columns.
void make_scales(Format format, Random& random, uint8_t* row, int k, std::vector<float>& d,
                 std::vector<float>& m) {
  const FormatLayout layout = layout_of(format);
  const int blocks = k / 32;
  const auto put = [&](int64_t at, float x) {
    const uint16_t bits = to_half<Fp16>(x);
    std::memcpy(row + at, &bits, 2);
  };
  for (int b = 0; b < blocks; ++b) {
    const int group = layout.group == 0 ? 0 : b * 32 / layout.group;
    const bool first = b == 0 || (layout.group && b * 32 % layout.group == 0);
    const auto at = static_cast<size_t>(b);
    if (!first) {
      d.push_back(d[at - 1]);
      m.push_back(m[at - 1]);
      continue;
    }
    float scale = 0.02f * random.value(), second = 0.f;
    if (format == Format::q4_k) {
      uint8_t* record = row + b / 8 * 20;
      if (b % 8 == 0) put(b / 8 * 20, scale), put(b / 8 * 20 + 2, 0.01f * random.value());
      const auto sc = static_cast<uint8_t>(random.bits() % 64),
                 mn = static_cast<uint8_t>(random.bits() % 64);
      record[4 + b % 8 * 2] = sc;
      record[5 + b % 8 * 2] = mn;
      uint16_t super[2];
      std::memcpy(super, record, 4);
      scale = from_half<Fp16>(super[0]) * static_cast<float>(sc);
      second = -from_half<Fp16>(super[1]) * static_cast<float>(mn);
    } else if (format == Format::nf4_dq) {
      const float whole = 0.001f;
      std::memcpy(row, &whole, 4);
      row[4 + group] = static_cast<uint8_t>(random.bits());
      scale = whole * static_cast<float>(row[4 + group]);
    } else if (layout.scales == DType::f32) {
      std::memcpy(row + 4 * group, &scale, 4);
    } else if (layout.sides == 1) {
      scale = half(scale);
      put(2 * group, scale);
    } else {
      scale = half(scale);
      second = format == Format::q4_1 ? half(0.1f * random.value())
                                      : static_cast<float>(random.bits() % 16);
      put(4 * group, scale);
      put(4 * group + 2, second);
      if (format != Format::q4_1) second = -(scale * second);
    }
    d.push_back(scale);
    m.push_back(second);
  }
}

Inputs make(const Problem& q) {
  const FormatLayout layout = layout_of(q.format);
  const int64_t blocks = q.k / 32, scale_bytes = row_scale_bytes(q.format, q.k);
  const int64_t item = layout.scales == DType::u8 ? 1 : layout.scales == DType::f16 ? 2 : 4;
  Inputs in{Owned(DType::i8, {q.n, blocks, layout.words, 1, 4}),
            Owned(item == 1   ? DType::i8
                  : item == 2 ? DType::f16
                              : DType::f32,
                  {q.n, scale_bytes / item}),
            Owned(DType::bf16, {q.m, q.k + 4}),
            Owned(q.half_bias ? DType::bf16 : DType::f32, {q.n}),
            {}};
  in.data.view.dtype = DType::u8;
  in.scales.view.dtype = layout.scales;
  in.x.view.shape[1] = q.k;
  Random random(static_cast<uint64_t>(q.k * 7 + q.n));
  uint8_t* data = in.data.as<uint8_t>();
  for (size_t i = 0; i < in.data.bytes; ++i) {
    data[i] = static_cast<uint8_t>(random.bits());
    const bool nan = (data[i] & 0x7f) == 0x7f;
    if (nan && (q.format == Format::fp8 || q.format == Format::fp8_block)) data[i] ^= 1;
  }
  in.weight.resize(static_cast<size_t>(q.n) * static_cast<size_t>(q.k));
  for (int row = 0; row < q.n; ++row) {
    std::vector<float> d, m;
    make_scales(q.format, random, in.scales.as<uint8_t>() + row * scale_bytes, q.k, d, m);
    for (int c = 0; c < q.k; ++c) {
      const auto b = static_cast<size_t>(c / 32);
      const uint8_t* block = data + (row * blocks + c / 32) * 4 * layout.words;
      in.weight[static_cast<size_t>(row) * static_cast<size_t>(q.k) + static_cast<size_t>(c)] =
          code_of(q.format, block, c % 32) * d[b] + m[b];
    }
  }
  for (int t = 0; t < q.m; ++t)
    for (int c = 0; c < q.k; ++c)
      in.x.as<uint16_t>()[t * (q.k + 4) + c] = to_half<Bf16>(random.value());
  for (int i = 0; i < q.n; ++i)
    q.half_bias ? void(in.bias.as<uint16_t>()[i] = to_half<Bf16>(random.value()))
                : void(in.bias.as<float>()[i] = random.value());
  return in;
}

std::vector<float> run(const Problem& q, const Inputs& in, emulated::Options options) {
  emulated::Device& d = emulated::device();
  d.options = options;
  d.readable.clear();
  d.writable.clear();
  Owned y(q.half_y ? DType::bf16 : DType::f32, {q.m, q.n});
  Owned partials(DType::f32, {kMostSplits, q.m, q.n});
  const QuantMatmulCall call = quant_matmul_call(y.view, in.x.view, in.data.view, in.scales.view,
                                                 static_cast<int64_t>(q.format),
                                                 q.bias ? in.bias.view : Tensor{}, partials.view);
  for (const Owned* t : {&y, &partials}) d.allow(t->memory.get(), t->bytes, true);
  for (const Owned* t : {&in.data, &in.scales, &in.x, &in.bias})
    d.allow(t->memory.get(), t->bytes, false);
  visit_product(call, [&](auto v) {
    using I = decltype(v);
    const auto rows = static_cast<unsigned>(16 * I::kRowTiles);
    emulated::launch(
        {(static_cast<unsigned>(q.n) + rows - 1) / rows, static_cast<unsigned>(call.p.splits), 1},
        kProductThreads, static_cast<size_t>(I::kSharedBytes),
        [&] { product_rows<I::kCodes, I::kTokenTiles, I::kRowTiles>(call.p); });
  });
  if (call.p.partials)
    emulated::launch(
        {static_cast<unsigned>((q.m * q.n + kProductThreads - 1) / kProductThreads), 1, 1},
        kProductThreads, 0, [&] { product_sum_splits(call.p); });
  std::vector<float> out(static_cast<size_t>(q.m) * static_cast<size_t>(q.n));
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = q.half_y ? from_half<Bf16>(y.as<uint16_t>()[i]) : y.as<float>()[i];
  return out;
}

// The sum's fp32 roundings, and the one to bf16.
double judge(const Problem& q, const Inputs& in, const std::vector<float>& y) {
  double worst = 0;
  for (int t = 0; t < q.m; ++t)
    for (int row = 0; row < q.n; ++row) {
      double sum = 0, size = 0;
      const double* w = in.weight.data() + static_cast<size_t>(row) * static_cast<size_t>(q.k);
      for (int c = 0; c < q.k; ++c) {
        const double part = w[c] * from_half<Bf16>(in.x.as<uint16_t>()[t * (q.k + 4) + c]);
        sum += part;
        size += std::fabs(part);
      }
      if (q.bias)
        sum +=
            q.half_bias ? from_half<Bf16>(in.bias.as<uint16_t>()[row]) : in.bias.as<float>()[row];
      const double bound = 4e-6 * size + (q.half_y ? std::ldexp(std::fabs(sum), -8) : 0) + 1e-9;
      const double got =
          y[static_cast<size_t>(t) * static_cast<size_t>(q.n) + static_cast<size_t>(row)];
      REQUIRE(std::fabs(got - sum) <= bound, "%s: token %d row %d is %g, not %g (bound %g)",
              q.name().c_str(), t, row, got, sum, bound);
      worst = std::max(worst, std::fabs(got - sum) / bound);
    }
  return worst;
}

int cases = 0;
double worst = 0;

void check_case(const Problem& q) {
  const Inputs in = make(q);
  const std::vector<float> first = run(q, in, {});
  worst = std::max(worst, judge(q, in, first));
  const auto same = [](const std::vector<float>& a, const float* b) {
    return a.empty() || !std::memcmp(a.data(), b, 4 * a.size());
  };
  if (cases % 3 == 0)
    for (const emulated::Options options : {emulated::Options{true, false}, {true, true}})
      REQUIRE(same(run(q, in, options), first.data()), "%s: the order of warps or copies matters",
              q.name().c_str());
  if (q.m > 1 && cases % 2 == 0) {  // the last token alone
    Problem one = q;
    one.m = 1;
    Inputs alone = in;
    alone.x.view.shape[0] = 1;
    alone.x.view.data = in.x.as<uint16_t>() + (q.m - 1) * (q.k + 4);
    REQUIRE(same(run(one, alone, {}),
                 first.data() + static_cast<size_t>(q.m - 1) * static_cast<size_t>(q.n)),
            "%s: a token depends on others", q.name().c_str());
  }
  ++cases;
}

void all_cases(bool full) {
  const Format formats[] = {Format::q4_0,           Format::q4_1,          Format::q8_0,
                            Format::q4_k,           Format::int4_g32,      Format::int4_g64,
                            Format::int4_g128,      Format::int4_asym_g32, Format::int4_asym_g64,
                            Format::int4_asym_g128, Format::int8,          Format::nf4,
                            Format::nf4_dq,         Format::fp8,           Format::fp8_block};
  const int rows[] = {1, 3, 8, 9, 16, 17, 32, 0}, widths[] = {17, 1, 16, 48, 33, 0};
  const int columns[] = {256, 512, 768, 2304};
  int i = 0;
  for (const Format format : formats)
    for (int r = 0; r < (full ? 8 : 2); ++r, ++i) {
      Problem q{format, rows[full ? r : i % 7], widths[i % 6], columns[i % 4]};
      q.bias = i % 2 == 0;
      q.half_bias = i % 4 == 0;
      q.half_y = i % 3 == 0;
      check_case(q);
      if (layout_of(format).columns == 32) {  // a short chunk and segment at the end of K
        q.k = columns[i % 4] - 32 * (1 + i % 3);
        check_case(q);
      }
    }
  // Splits of K, and a warp with 32 rows.
  for (const Format format : {Format::int4_g128, Format::q4_1, Format::int8}) {
    check_case({format, 2, 20, 8192 + (format == Format::int4_g128 ? 128 : 32)});
    if (full) check_case({format, 11, 20, 12288, true});
    check_case({format, full ? 20 : 1, static_cast<int>(kManyRows) + 5, 256});
  }
}

}  // namespace

int main(int argc, char** argv) {
  all_cases(argc > 1 && std::string(argv[1]) == "full");
  std::printf("%d cases, at most %.2f of the bound\n", cases, worst);
}
