// The grouped products and the gradients of experts, against plain sums in double: empty experts,
// all rows on one, rows of none, slots that do not exist.
#include "columns.h"
#include "packs.h"

namespace fastllm::test {
namespace {

float tolerance_of(DType dtype) { return dtype == DType::bf16 ? 4e-2f : 2e-4f; }

struct Experts {
  Owned offsets, slots;
  int64_t tokens, per_token, count;

  int32_t begin(int64_t e) const { return offsets.view.as<int32_t>()[e]; }
  int32_t slot(int64_t row) const { return slots.view.as<int32_t>()[row]; }
};

// Slots of tokens in the order of experts: expert e takes every slot that choice(slot) gives it.
Experts sorted(int64_t tokens, int64_t per_token, int64_t count,
               const std::function<int64_t(int64_t)>& choice) {
  Experts x{Owned(DType::i32, {count + 1}), Owned(DType::i32, {tokens * per_token}), tokens,
            per_token, count};
  int32_t rows = 0;
  for (int64_t e = 0; e < count; ++e) {
    for (int32_t s = 0; s < tokens * per_token; ++s)
      if (choice(s) == e) x.slots.view.as<int32_t>()[rows++] = s;
    x.offsets.view.as<int32_t>()[e + 1] = rows;
  }
  for (; rows < tokens * per_token; ++rows) x.slots.view.as<int32_t>()[rows] = -1;
  return x;
}

void check_near(float got, double want, float tolerance) {
  CHECK(std::fabs(got - want) <= tolerance * (1 + std::fabs(want)));
}

void grouped() {
  Random random(31);
  const int64_t rows = 34, experts = 4, n = 35, k = 19;
  Owned offsets = ints({0, 13, 13, 14, 31});
  for (DType dtype : {DType::f32, DType::bf16})
    for (bool transposed : {false, true}) {
      Owned x = random.tensor(dtype, {rows, k}), y(dtype, {rows, n});
      Owned weight = transposed ? random.tensor(dtype, {experts, k, n})
                                : random.tensor(dtype, {experts, n, k});
      Owned bias = random.tensor(DType::f32, {experts, n});
      run_everywhere("grouped_matmul", &Kernels::grouped_matmul,
                     grouped_matmul_args(y, x, weight, offsets, bias, transposed), {&y},
                     tolerance_of(dtype), [&] {
                       for (int64_t r = 0; r < rows; ++r)
                         for (int64_t c = 0; c < n; ++c) {
                           int64_t e = 0;
                           while (e < experts && r >= offsets.view.as<int32_t>()[e + 1]) ++e;
                           double want = e < experts ? bias.get(e * n + c) : 0;
                           for (int64_t i = 0; i < k && e < experts; ++i)
                             want += static_cast<double>(x.get(r * k + i)) *
                                     weight.get(e * n * k + (transposed ? i * n + c : c * k + i));
                           check_near(y.get(r * n + c), want, tolerance_of(dtype));
                         }
                     });
    }
}

void weight_gradients() {
  Random random(32);
  const int64_t rows = 1200, experts = 3, n = 21, k = 35;
  for (DType dtype : {DType::f32, DType::bf16})
    for (DType out : {DType::f32, DType::bf16}) {
      Owned offsets = ints({0, 1100, 1100, 1113});
      Owned dy = random.tensor(dtype, {rows, n}, 0.1f), x = random.tensor(dtype, {rows, k});
      Owned dweight(out, {experts, n, k});
      run_everywhere(
          "grouped_weight_grad", &Kernels::grouped_weight_grad,
          grouped_weight_grad_args(dweight, dy, x, offsets), {&dweight}, tolerance_of(out), [&] {
            for (int64_t e = 0; e < experts; ++e)
              for (int64_t i = 0; i < n * k; ++i) {
                double want = 0;
                for (int64_t r = offsets.view.as<int32_t>()[e];
                     r < offsets.view.as<int32_t>()[e + 1]; ++r)
                  want += static_cast<double>(dy.get(r * n + i / k)) * x.get(r * k + i % k);
                check_near(dweight.get(e * n * k + i), want, tolerance_of(out));
              }
          });
    }
}

// The gradients of SwiGLU experts by plain sums.
struct Expected {
  std::vector<double> dx, dw, dgate_up, ddown, dgate_up_bias, ddown_bias;
};
Expected expected(const Experts& s, int64_t hidden, int64_t inner, const Owned& dy, const Owned& x,
                  const Owned& gate_up, const Owned& down, const Owned& w, const Owned& pre,
                  const Owned& down_bias) {
  Expected want{std::vector<double>(s.tokens * hidden),
                std::vector<double>(s.tokens * s.per_token),
                std::vector<double>(s.count * 2 * inner * hidden),
                std::vector<double>(s.count * hidden * inner),
                std::vector<double>(s.count * 2 * inner),
                std::vector<double>(s.count * hidden)};
  for (int64_t e = 0; e < s.count; ++e)
    for (int64_t row = s.begin(e); row < s.begin(e + 1); ++row) {
      const int64_t slot = s.slot(row), t = slot / s.per_token;
      for (int64_t h = 0; h < hidden; ++h) {
        want.dw[slot] +=
            static_cast<double>(dy.get(t * hidden + h)) * down_bias.get(e * hidden + h);
        want.ddown_bias[e * hidden + h] += w.get(slot) * dy.get(t * hidden + h);
      }
      for (int64_t i = 0; i < inner; ++i) {
        double da = 0;
        for (int64_t h = 0; h < hidden; ++h)
          da +=
              static_cast<double>(dy.get(t * hidden + h)) * down.get((e * hidden + h) * inner + i);
        const double gate = pre.get(row * 2 * inner + i), up = pre.get((row * 2 + 1) * inner + i);
        const double sigmoid = 1 / (1 + std::exp(-gate)), a = gate * sigmoid * up;
        want.dw[slot] += da * a;
        const double both[2] = {da * w.get(slot) * up * sigmoid * (1 + gate * (1 - sigmoid)),
                                da * w.get(slot) * gate * sigmoid};
        for (int64_t h = 0; h < hidden; ++h)
          want.ddown[(e * hidden + h) * inner + i] += w.get(slot) * a * dy.get(t * hidden + h);
        for (int half = 0; half < 2; ++half) {
          const int64_t at = e * 2 * inner + half * inner + i;
          want.dgate_up_bias[at] += both[half];
          for (int64_t h = 0; h < hidden; ++h) {
            want.dgate_up[at * hidden + h] += both[half] * x.get(t * hidden + h);
            want.dx[t * hidden + h] += both[half] * gate_up.get(at * hidden + h);
          }
        }
      }
    }
  return want;
}

void check_all(const Owned& got, const std::vector<double>& want, float tolerance) {
  for (size_t i = 0; i < want.size(); ++i)
    check_near(got.get(static_cast<int64_t>(i)), want[i], tolerance);
}

void dense_experts(const Experts& s, DType dtype, DType gradients) {
  Random random(33);
  const int64_t hidden = 37, inner = 21, slots = s.tokens * s.per_token;
  const int64_t rows = s.begin(s.count);
  Owned dy = random.tensor(dtype, {s.tokens, hidden}, 0.3f);
  Owned x = random.tensor(dtype, {s.tokens, hidden});
  Owned gate_up = random.tensor(dtype, {s.count, 2 * inner, hidden}, 0.3f);
  Owned down = random.tensor(dtype, {s.count, hidden, inner}, 0.3f);
  Owned w = random.tensor(DType::f32, {s.tokens, s.per_token});
  Owned pre = random.tensor(dtype, {slots, 2 * inner});
  Owned down_bias = random.tensor(DType::f32, {s.count, hidden}, 0.3f);
  Owned dx(dtype, {s.tokens, hidden}), dgate_up(gradients, {s.count, 2 * inner, hidden});
  Owned ddown(gradients, {s.count, hidden, inner}), dw(DType::f32, {s.tokens, s.per_token});
  Owned dgate_up_bias(DType::f32, {s.count, 2 * inner}), ddown_bias(DType::f32, {s.count, hidden});
  Owned dpre(dtype, {rows, 2 * inner}), weighted(dtype, {rows, inner});
  Owned dx_rows(DType::f32, {rows, hidden}), row_of(DType::i32, {slots});
  const Expected want = expected(s, hidden, inner, dy, x, gate_up, down, w, pre, down_bias);
  const float tolerance = tolerance_of(dtype);
  run_everywhere("moe_backward", &Kernels::moe_backward,
                 moe_backward_args(dx, dgate_up, ddown, dw, dgate_up_bias, ddown_bias, dy, x,
                                   gate_up, down, w, s.offsets, s.slots, pre, down_bias, dpre,
                                   weighted, dx_rows, row_of, 0, false),
                 {&dx, &dgate_up, &ddown, &dw, &dgate_up_bias, &ddown_bias}, tolerance, [&] {
                   check_all(dx, want.dx, tolerance);
                   check_all(dw, want.dw, tolerance);
                   check_all(dgate_up, want.dgate_up, tolerance);
                   check_all(ddown, want.ddown, tolerance);
                   check_all(dgate_up_bias, want.dgate_up_bias, tolerance);
                   check_all(ddown_bias, want.ddown_bias, tolerance);
                 });
  Owned first = to_columns(gate_up, true), second = to_columns(down, false);
  Owned dfirst = empty_columns(gradients, gate_up), dsecond = empty_columns(gradients, down);
  run_everywhere("moe_backward", &Kernels::moe_backward,
                 moe_backward_args(dx, dfirst, dsecond, dw, dgate_up_bias, ddown_bias, dy, x, first,
                                   second, w, s.offsets, s.slots, pre, down_bias, dpre, weighted,
                                   dx_rows, row_of, 0, true),
                 {&dx, &dfirst, &dsecond, &dw, &dgate_up_bias, &ddown_bias}, tolerance, [&] {
                   check_all(dx, want.dx, tolerance);
                   check_all(dw, want.dw, tolerance);
                   each_place(gate_up, true, [&](int64_t row, int64_t at) {
                     check_near(dfirst.get(at), want.dgate_up[row], tolerance);
                   });
                   each_place(down, false, [&](int64_t row, int64_t at) {
                     check_near(dsecond.get(at), want.ddown[row], tolerance);
                   });
                   for (int64_t e = 0; e < s.count; ++e)
                     for (int64_t i = 0; i < 2 * inner; ++i)
                       check_near(dgate_up_bias.get(e * 2 * inner + i),
                                  want.dgate_up_bias[e * 2 * inner + i / 2 + i % 2 * inner],
                                  tolerance);
                   check_all(ddown_bias, want.ddown_bias, tolerance);
                 });
}

// Frozen experts in packed formats run.
void packed_experts(const Experts& s, DType dtype, int64_t inner) {
  Random random(34);
  const int64_t hidden = 2 * inner, slots = s.tokens * s.per_token, rows = s.begin(s.count);
  Owned dy = random.tensor(dtype, {s.tokens, hidden}, 0.3f);
  Owned w = random.tensor(DType::f32, {s.tokens, s.per_token});
  Owned pre = random.tensor(dtype, {slots, 2 * inner});
  Owned dx(dtype, {s.tokens, hidden}), dw(DType::f32, {s.tokens, s.per_token});
  Owned dpre(dtype, {rows, 2 * inner}), dx_rows(DType::f32, {rows, hidden});
  Owned row_of(DType::i32, {slots});
  for (Format format : all_formats()) {
    if (inner != whole(format, 32)) continue;
    Packed gate_up = random_experts(random, format, s.count, 2 * inner, hidden);
    Packed down = random_experts(random, format, s.count, hidden, inner);
    const int64_t code = static_cast<int64_t>(format);
    for (int64_t gating = 0; gating < (inner == 32 ? 4 : 1); ++gating)
      run_everywhere("quant_moe_backward", &Kernels::quant_moe_backward,
                     quant_moe_backward_args(dx, dw, dy, gate_up.data, gate_up.scales, code,
                                             down.data, down.scales, code, w, s.offsets, s.slots,
                                             pre, {}, dpre, dx_rows, row_of, gating),
                     {&dx, &dw}, tolerance_of(dtype));
  }
}

}  // namespace

void test_expert_gradients() {
  grouped();
  weight_gradients();
  const std::function<int64_t(int64_t)> choices[] = {
      [](int64_t s) { return s * 7 % 5; },  // expert 4 of 5 is not in the slice of 4
      [](int64_t) { return 2; },            // all on one, the others empty
      [](int64_t) { return 9; },            // on none
  };
  for (const auto& choice : choices) {
    const Experts s = sorted(29, 2, 4, choice);
    for (DType dtype : {DType::f32, DType::bf16}) {
      dense_experts(s, dtype, DType::f32);
      for (int64_t inner : {32, 64, 128, 256}) packed_experts(s, dtype, inner);
    }
    dense_experts(s, DType::bf16, DType::bf16);
  }
  Experts broken = sorted(29, 2, 4, choices[0]);  // slots of no token: nothing out of bounds
  broken.slots.view.as<int32_t>()[3] = 58;
  broken.slots.view.as<int32_t>()[5] = -7;
  packed_experts(broken, DType::f32, 32);
}

}  // namespace fastllm::test
