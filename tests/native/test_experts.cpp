// moe_dispatch, moe, quant_moe: sorted slots against a list, a layer against the products of its
// experts one by one, to the bit.
#include "columns.h"
#include "packs.h"

namespace fastllm::test {
namespace {

// One expert's part of a tensor whose first dimension is experts.
Tensor part(Tensor t, int64_t e) {
  t.data = t.as<char>() + e * t.stride[0] * static_cast<int64_t>(size_of(t.dtype));
  for (int i = 1; i < t.ndim; ++i) t.shape[i - 1] = t.shape[i], t.stride[i - 1] = t.stride[i];
  t.ndim -= 1;
  return t;
}

struct Routes {
  Owned ids, offsets, slots;
};

Routes route(Random& random, int64_t tokens, int64_t k, int64_t experts, int64_t first) {
  Routes r{Owned(DType::i32, {tokens, k}), Owned(DType::i32, {experts + 1}),
           Owned(DType::i32, {tokens * k})};
  const int64_t count = tokens * k;
  for (int64_t i = 0; i < count; ++i)  // some of none, some of experts elsewhere
    r.ids.view.as<int32_t>()[i] = static_cast<int32_t>(random.bits() % (experts + first + 2)) - 1;
  Owned counts(DType::i32, {moe_dispatch_scratch(count, experts)});
  run_everywhere("moe_dispatch", &Kernels::moe_dispatch,
                 moe_dispatch_args(r.offsets, r.slots, counts, r.ids, first),
                 {&r.offsets, &r.slots}, 0, [&] {
                   int64_t row = 0;
                   for (int64_t e = 0; e < experts; ++e) {
                     CHECK(r.offsets.view.as<int32_t>()[e] == row);
                     for (int64_t s = 0; s < count; ++s)
                       if (r.ids.view.as<int32_t>()[s] == e + first)
                         CHECK(r.slots.view.as<int32_t>()[row++] == s);
                   }
                   CHECK(r.offsets.view.as<int32_t>()[experts] == row);
                   for (; row < count; ++row) CHECK(r.slots.view.as<int32_t>()[row] == -1);
                 });
  return r;
}

// y, by a product of one expert's rows: product(e, second, x, y).
using Product = std::function<void(int64_t, bool, Owned&, Owned&)>;

void check_layer(const Routes& r, const Owned& x, const Owned& weights, const Owned& base,
                 const Owned& pre, const Owned& y, int64_t inner, const Product& product) {
  const int64_t tokens = x.view.shape[0], hidden = x.view.shape[1], k = weights.view.shape[1];
  const int64_t size = static_cast<int64_t>(size_of(x.view.dtype));
  const int32_t *offsets = r.offsets.view.as<int32_t>(), *slots = r.slots.view.as<int32_t>();
  std::vector<std::vector<float>> outputs(static_cast<size_t>(tokens * k));
  for (int64_t e = 0; e + 1 < r.offsets.view.shape[0]; ++e) {
    const int64_t begin = offsets[e], m = offsets[e + 1] - begin;
    Owned rows(x.view.dtype, {m, hidden}), h(x.view.dtype, {m, 2 * inner});
    Owned a(x.view.dtype, {m, inner}), o(DType::f32, {m, hidden});
    for (int64_t i = 0; i < m; ++i)
      std::memcpy(rows.view.as<char>() + i * hidden * size,
                  x.view.as<char>() + slots[begin + i] / k * hidden * size,
                  static_cast<size_t>(hidden * size));
    product(e, false, rows, h);
    CHECK(std::memcmp(pre.view.as<char>() + begin * 2 * inner * size, h.view.data, h.bytes) == 0);
    Tensor gate = h, up = h;
    gate.shape[1] = up.shape[1] = inner;
    up.data = h.view.as<char>() + inner * size;
    run_call(Call("swiglu", active_kernels().swiglu, swiglu_args(a, gate, up, 0)));
    product(e, true, a, o);
    for (int64_t i = 0; i < m; ++i)
      outputs[slots[begin + i]].assign(o.view.as<float>() + i * hidden,
                                       o.view.as<float>() + (i + 1) * hidden);
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < hidden; ++c) {
      float want = 0;
      for (int64_t j = 0; j < k; ++j)
        if (const std::vector<float>& o = outputs[t * k + j]; !o.empty()) {
          const float weighted = weights.get(t * k + j) * o[c];
          want += weighted;
        }
      want += base.get(t * hidden + c);
      CHECK(y.get(t * hidden + c) == want);
    }
}

void plain_layers() {
  Random random(31);
  for (DType dtype : {DType::f32, DType::bf16})
    for (const auto& [tokens, k, experts, hidden, inner] :
         {std::array<int64_t, 5>{1, 2, 4, 33, 17}, {9, 3, 5, 64, 32}, {120, 2, 3, 70, 35}}) {
      const Routes r = route(random, tokens, k, experts, 1);
      Owned x = random.tensor(dtype, {tokens, hidden}), y(DType::f32, {tokens, hidden});
      Owned gate_up = random.tensor(dtype, {experts, 2 * inner, hidden}, 0.3f);
      Owned down = random.tensor(dtype, {experts, hidden, inner}, 0.3f);
      Owned b1 = random.tensor(DType::f32, {experts, 2 * inner});
      Owned b2 = random.tensor(DType::bf16, {experts, hidden});
      Owned weights = random.tensor(DType::f32, {tokens, k});
      Owned base = random.tensor(DType::f32, {tokens, hidden});
      Owned pre(dtype, {tokens * k, 2 * inner});
      Owned scratch(DType::u8, {moe_scratch(tokens, hidden, tokens * k, inner)});
      const Product product = [&](int64_t e, bool second, Owned& from, Owned& to) {
        const Owned &weight = second ? down : gate_up, &bias = second ? b2 : b1;
        run_call(Call("linear", active_kernels().linear,
                      linear_args(to, from, part(weight, e), part(bias, e), {})));
      };
      const auto layer = [&](const Owned& first, const Owned& second, bool paired) {
        run_everywhere("moe", &Kernels::moe,
                       moe_args(y, pre, x, first, second, weights, r.offsets, r.slots, b1, b2, base,
                                0, paired, scratch),
                       {&y}, 3e-2f,
                       [&] { check_layer(r, x, weights, base, pre, y, inner, product); });
      };
      layer(gate_up, down, false);
      layer(to_columns(gate_up, false), down, false);
      layer(to_columns(gate_up, true), to_columns(down, false), true);
      for (int64_t gating = 1; gating < 4; ++gating)
        run_everywhere("moe", &Kernels::moe,
                       moe_args(y, Owned(dtype, {0, 2 * inner}), x, gate_up, down, weights,
                                r.offsets, r.slots, {}, {}, {}, gating, false, scratch),
                       {&y}, 3e-2f);
    }
}

// e4m3 codes have mode fp8 where others have int8.
int64_t mode_of(Format format, int64_t mode) {
  const bool float8 = format == Format::fp8 || format == Format::fp8_block;
  return float8 && mode == static_cast<int64_t>(Activation::int8)
             ? static_cast<int64_t>(Activation::fp8)
             : mode;
}

void packed_layer(Random& random, Format first, Format second, Activation mode, DType dtype,
                  int64_t tokens, int64_t hidden, int64_t inner) {
  const int64_t k = 2, experts = 4, code = static_cast<int64_t>(mode);
  const Routes r = route(random, tokens, k, experts, 0);
  Packed gate_up = random_experts(random, first, experts, 2 * inner, hidden);
  Packed down = random_experts(random, second, experts, hidden, inner);
  Owned x = random.tensor(dtype, {tokens, hidden}), y(DType::f32, {tokens, hidden});
  Owned weights = random.tensor(DType::f32, {tokens, k});
  Owned base = random.tensor(DType::f32, {tokens, hidden});
  Owned b1 = random.tensor(DType::bf16, {experts, 2 * inner});
  Owned pre(dtype, {tokens * k, 2 * inner});
  Owned scratch(DType::u8, {moe_scratch(tokens, hidden, tokens * k, inner)});
  const Product product = [&](int64_t e, bool last, Owned& from, Owned& to) {
    const Packed& w = last ? down : gate_up;
    const Tensor bias = last ? Tensor{} : part(b1, e);
    run_call(Call(
        "quant_matmul", active_kernels().quant_matmul,
        quant_matmul_args(to, from, part(w.data, e), part(w.scales, e),
                          static_cast<int64_t>(w.format), w.n, bias, mode_of(w.format, code), {})));
  };
  run_everywhere(
      "quant_moe", &Kernels::quant_moe,
      quant_moe_args(y, pre, x, gate_up.data, gate_up.scales, static_cast<int64_t>(first),
                     down.data, down.scales, static_cast<int64_t>(second), inner, weights,
                     r.offsets, r.slots, b1, {}, base, 0, code, scratch),
      {&y}, mode == Activation::int8 ? -1.f : 5e-2f,
      [&] { check_layer(r, x, weights, base, pre, y, inner, product); });
}

void packed_layers() {
  Random random(32);
  for (Format format : all_formats()) {
    if (is_dense(format)) continue;
    for (int64_t tokens : {2, 37})
      for (Activation mode : {Activation::int8, Activation::bf16, Activation::fp32}) {
        const DType dtype = mode == Activation::bf16 ? DType::bf16 : DType::f32;
        const Format other = tokens == 2 ? Format::q8_0 : format;
        packed_layer(random, format, other, mode, dtype, tokens, whole(format, 64),
                     whole(other, 32));
      }
  }
  for (int64_t tokens : {1, 25}) {
    packed_layer(random, Format::bf16, Format::bf16, Activation::int8, DType::bf16, tokens, 37, 21);
    packed_layer(random, Format::f32, Format::f32, Activation::int8, DType::f32, tokens, 37, 21);
    packed_layer(random, Format::q4_0, Format::bf16, Activation::int8, DType::bf16, tokens, 32, 48);
    packed_layer(random, Format::f32, Format::q4_1, Activation::int8, DType::f32, tokens, 40, 96);
  }
}

}  // namespace

void test_experts() {
  Random random(30);
  route(random, 3001, 7, 19, 5);  // more slots than a chunk
  route(random, 3, 2, 0, 0);
  route(random, 0, 2, 4, 0);
  plain_layers();
  packed_layers();
}

}  // namespace fastllm::test
