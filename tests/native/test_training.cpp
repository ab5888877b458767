// Gradients of the element-wise ops, the optimizer's step, the sum of squares: odd sizes, against
// scalar formulas in double.
#include "gated.h"
#include "harness.h"

namespace fastllm::test {
namespace {

constexpr DType kFloats[] = {DType::f32, DType::bf16};

float tolerance_of(DType dtype) { return dtype == DType::f32 ? 2e-5f : 1e-2f; }
bool close(float got, double want, DType dtype) {
  return std::fabs(got - want) <= tolerance_of(dtype) * (1 + std::fabs(want));
}

void norm_gradients() {
  Random random(1);
  for (DType dtype : kFloats)
    for (int64_t n : {1, 3, 17, 100, 1100})
      for (bool residual : {false, true}) {
        const int64_t rows = n < 100 ? 300 : 35;  // more than a chunk
        Owned x = random.tensor(residual ? DType::f32 : dtype, {rows, n});
        Owned dy = random.tensor(dtype, {rows, n}), dh = random.tensor(DType::f32, {rows, n});
        Owned w = random.tensor(DType::f32, {n}), dx(dtype, {rows, n}), dw(DType::f32, {n});
        Owned dresidual(DType::f32, {rows, n});
        Owned partial(DType::f32, {rms_norm_backward_scratch(rows, n)});
        const RmsNormBackwardArgs args =
            residual ? rms_norm_backward_args(dx, dresidual, dw, partial, dy, dh, x, w, 1e-5)
                     : rms_norm_backward_args(dx, {}, dw, partial, dy, {}, x, w, 1e-5);
        run_everywhere("rms_norm_backward", &Kernels::rms_norm_backward, args,
                       {&dx, &dw, &dresidual}, tolerance_of(dtype), [&] {
                         std::vector<double> sums(n);
                         for (int64_t row = 0; row < rows; ++row) {
                           double squares = 0, products = 0;
                           for (int64_t i = row * n; i < (row + 1) * n; ++i) {
                             squares += static_cast<double>(x.get(i)) * x.get(i);
                             products += static_cast<double>(dy.get(i)) * w.get(i % n) * x.get(i);
                           }
                           const double rstd = 1 / std::sqrt(squares / n + 1e-5);
                           for (int64_t i = row * n; i < (row + 1) * n; ++i) {
                             const double normed = x.get(i) * rstd;
                             const double want =
                                 rstd * (dy.get(i) * w.get(i % n) - normed * products * rstd / n) +
                                 (residual ? dh.get(i) : 0.f);
                             CHECK(close(dx.get(i), want, dtype));
                             if (residual) CHECK(close(dresidual.get(i), want, DType::f32));
                             sums[i % n] += dy.get(i) * normed;
                           }
                         }
                         for (int64_t c = 0; c < n; ++c)
                           CHECK(close(dw.get(c), sums[c], DType::f32));
                       });
      }
}

void gate_gradients() {
  Random random(2);
  for (DType dtype : kFloats)
    for (int64_t n : {1, 15, 33, 2100})
      for (Gating gating : kGatings) {
        Owned dy = random.tensor(dtype, {3, n}), gate = random.tensor(dtype, {3, n}, 9);
        Owned up = random.tensor(dtype, {3, n}, 9), both(dtype, {3, 2 * n});
        run_everywhere("swiglu_backward", &Kernels::swiglu_backward,
                       swiglu_backward_args(both, dy, gate, up, static_cast<int64_t>(gating)),
                       {&both}, tolerance_of(dtype), [&] {
                         for (int64_t i = 0; i < 3 * n; ++i) {
                           const Gated want = gated(gating, gate.get(i), up.get(i));
                           const int64_t at = i / n * 2 * n + i % n;
                           CHECK(close(both.get(at), dy.get(i) * want.by_gate, dtype));
                           CHECK(close(both.get(at + n), dy.get(i) * want.by_up, dtype));
                         }
                       });
      }
}

void table_gradients() {
  Random random(3);
  Owned ids = ints({6, 0, 6, 3, -1, 7, 6, 1 << 30});
  for (DType dtype : kFloats)
    for (DType out : {DType::f32, DType::bf16, DType::f16})
      for (int64_t k : {1, 17, 70}) {
        const int64_t n = 7, count = ids.view.numel();
        Owned dy = random.tensor(dtype, {count, k}), dweight(out, {n, k});
        Owned order(DType::i32, {n + 1 + count});
        run_everywhere("embedding_backward", &Kernels::embedding_backward,
                       embedding_backward_args(dweight, dy, ids, order), {&dweight}, 0, [&] {
                         std::vector<float> sums(n * k);
                         for (int64_t i = 0; i < count * k; ++i) {
                           const int64_t id = ids.view.as<int32_t>()[i / k];
                           if (id >= 0 && id < n) sums[id * k + i % k] += dy.get(i);
                         }
                         for (int64_t i = 0; i < n * k; ++i)
                           CHECK(std::fabs(dweight.get(i) - sums[i]) <=
                                 (out == DType::f32 ? 0 : 4e-3 * (1 + std::fabs(sums[i]))));
                       });
      }
  Owned none(DType::i32, {0}), no_rows(DType::f32, {0, 3}), cleared(DType::f32, {4, 3});
  Owned order(DType::i32, {5});
  run_everywhere("embedding_backward", &Kernels::embedding_backward,
                 embedding_backward_args(cleared, no_rows, none, order), {&cleared}, 0);
}

void steps() {
  Random random(4);
  Owned scale(DType::f32, {1});
  scale.set(0, 0.25f);
  for (DType dtype : kFloats)
    for (DType grad_type : kFloats)
      for (int64_t n : {1, 16, 37, 2100}) {
        Owned param = random.tensor(dtype, {n}), master = random.tensor(DType::f32, {n});
        Owned m = random.tensor(DType::f32, {n}), v = random.tensor(DType::f32, {n});
        for (int64_t i = 0; i < n; ++i) v.set(i, v.get(i) * v.get(i));
        Owned grad = random.tensor(grad_type, {n});
        const bool wide = dtype == DType::f32;
        const Tensor given = wide ? Tensor{} : Tensor(master);
        const AdamwStepArgs args =
            adamw_step_args(param, given, m, v, grad, scale, 0.01, 0.9, 0.95, 1e-8, 0.1, 3);
        std::vector<float> w0(n), m0(n), v0(n);
        for (int64_t i = 0; i < n; ++i)
          w0[i] = wide ? param.get(i) : master.get(i), m0[i] = m.get(i), v0[i] = v.get(i);
        run_everywhere(
            "adamw_step", &Kernels::adamw_step, args, {&param, &master, &m, &v}, 1e-2f, [&] {
              for (int64_t i = 0; i < n; ++i) {
                const double g = 0.25 * grad.get(i), mean = 0.9 * m0[i] + 0.1 * g;
                const double square = 0.95 * v0[i] + 0.05 * g * g;
                const double root = std::sqrt(square / (1 - 0.95 * 0.95 * 0.95)) + 1e-8;
                const double want =
                    w0[i] * (1 - 0.01 * 0.1) - 0.01 * mean / (1 - 0.9 * 0.9 * 0.9) / root;
                CHECK(close(m.get(i), mean, DType::f32) && close(v.get(i), square, DType::f32));
                CHECK(close((wide ? param : master).get(i), want, DType::f32));
                CHECK(close(param.get(i), want, dtype));
              }
            });
      }
}

void squares() {
  Random random(5);
  for (DType dtype : kFloats)
    for (int64_t n : {0, 1, 17, 100, 16384, 40001}) {
      Owned x = random.tensor(dtype, {n}), total(DType::f32, {1});
      Owned partial(DType::f32, {sum_of_squares_scratch(n)});
      run_everywhere("sum_of_squares", &Kernels::sum_of_squares,
                     sum_of_squares_args(total, partial, x), {&total}, 1e-5f, [&] {
                       double want = 0;
                       for (int64_t i = 0; i < n; ++i)
                         want += static_cast<double>(x.get(i)) * x.get(i);
                       CHECK(close(total.get(0), want, DType::f32));
                     });
    }
}

}  // namespace

void test_training() {
  norm_gradients();
  gate_gradients();
  table_gradients();
  steps();
  squares();
}

}  // namespace fastllm::test
