// rms_norm, swiglu, rope, embedding: odd sizes, against scalar formulas in double.
#include "gated.h"
#include "harness.h"

namespace fastllm::test {
namespace {

constexpr DType kFloats[] = {DType::f32, DType::bf16};

float tolerance_of(DType dtype) { return dtype == DType::f32 ? 1e-5f : 1e-2f; }
bool close(float got, double want, DType dtype) {
  return std::fabs(got - want) <= tolerance_of(dtype) * (1 + std::fabs(want));
}

void norms() {
  Random random(1);
  for (DType dtype : kFloats)
    for (int64_t n : {1, 3, 16, 17, 100})
      for (bool residual : {false, true}) {
        const int64_t rows = 5;
        Owned x = random.tensor(dtype, {rows, n}), w = random.tensor(DType::f32, {n});
        Owned r = random.tensor(DType::f32, {rows, n}), h(DType::f32, {rows, n}),
              y(dtype, {rows, n});
        const RmsNormArgs args =
            residual ? rms_norm_args(y, x, w, r, h, 1e-5) : rms_norm_args(y, x, w, {}, {}, 1e-5);
        run_everywhere("rms_norm", &Kernels::rms_norm, args, {&y, &h}, tolerance_of(dtype), [&] {
          for (int64_t row = 0; row < rows; ++row) {
            const auto value = [&](int64_t c) {
              const int64_t i = row * n + c;
              return static_cast<double>(x.get(i)) + (residual ? r.get(i) : 0.f);
            };
            double squares = 0;
            for (int64_t c = 0; c < n; ++c) squares += value(c) * value(c);
            for (int64_t c = 0; c < n; ++c) {
              const double want = value(c) / std::sqrt(squares / n + 1e-5) * w.get(c);
              CHECK(close(y.get(row * n + c), want, dtype));
            }
          }
        });
      }
}

void gates() {
  Random random(2);
  for (DType dtype : kFloats)
    for (int64_t n : {1, 15, 16, 33, 130})
      for (Gating gating : kGatings) {
        Owned gate = random.tensor(dtype, {3, n}, 9), up = random.tensor(dtype, {3, n}, 9);
        Owned y(dtype, {3, n});
        run_everywhere("swiglu", &Kernels::swiglu,
                       swiglu_args(y, gate, up, static_cast<int64_t>(gating)), {&y},
                       tolerance_of(dtype), [&] {
                         for (int64_t i = 0; i < 3 * n; ++i) {
                           const double want = gated(gating, gate.get(i), up.get(i)).value;
                           CHECK(close(y.get(i), want, dtype));
                         }
                       });
      }
}

void rotations() {
  Random random(3);
  for (DType dtype : kFloats)
    for (int64_t half : {1, 5, 16, 19}) {
      const int64_t tokens = 3, heads = 2, dim = 2 * half + 2;  // two dimensions pass through
      Owned x = random.tensor(dtype, {tokens, heads, dim}), y(dtype, {tokens, heads, dim});
      Owned cos = random.tensor(DType::f32, {9, half}), sin = random.tensor(DType::f32, {9, half});
      Owned positions = ints({8, 0, 3});
      run_everywhere("rope", &Kernels::rope, rope_args(y, x, positions, cos, sin), {&y},
                     tolerance_of(dtype), [&] {
                       for (int64_t t = 0; t < tokens; ++t)
                         for (int64_t h = 0; h < heads; ++h) {
                           const int64_t at = (t * heads + h) * dim;
                           const int64_t row = positions.view.as<int32_t>()[t] * half;
                           for (int64_t i = 0; i < half; ++i) {
                             const double a = x.get(at + i), b = x.get(at + half + i);
                             const double c = cos.get(row + i), s = sin.get(row + i);
                             CHECK(close(y.get(at + i), a * c - b * s, dtype));
                             CHECK(close(y.get(at + half + i), b * c + a * s, dtype));
                           }
                           for (int64_t i = 2 * half; i < dim; ++i)
                             CHECK(y.get(at + i) == x.get(at + i));
                         }
                     });
    }
}

void lookups() {
  Random random(4);
  Owned ids = ints({6, 0, 6, 3});
  for (DType dtype : kFloats)
    for (int64_t k : {1, 17, 64}) {
      Owned weight = random.tensor(dtype, {7, k}), y(dtype, {4, k});
      run_everywhere("embedding", &Kernels::embedding, embedding_args(y, ids, weight), {&y}, 0,
                     [&] {
                       for (int64_t i = 0; i < 4 * k; ++i)
                         CHECK(y.get(i) == weight.get(ids.view.as<int32_t>()[i / k] * k + i % k));
                     });
    }
}

}  // namespace

void test_elementwise() {
  norms();
  gates();
  rotations();
  lookups();
}

}  // namespace fastllm::test
