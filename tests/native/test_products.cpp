// pack, quant_matmul and its input's gradient, quant_embedding, linear: every format and activation mode at odd sizes.
#include "harness.h"

namespace fastllm::test {
namespace {

struct Packed {
  Owned data, scales;
};

// Blocks with random codes and small finite scales, packed by the kernel itself.
Packed pack_random(Random& random, Format format, int64_t n, int64_t k) {
  const int64_t groups = (n + 15) / 16;
  if (format == Format::bf16 || format == Format::f32) {
    const bool bf16 = format == Format::bf16;
    const DType dtype = bf16 ? DType::bf16 : DType::f32;
    Owned rows = random.tensor(dtype, {n, k});
    Packed packed{bf16 ? Owned(dtype, {groups, (k + 1) / 2, 16, 2}) : Owned(dtype, {groups, k, 16}),
                  Owned(DType::f16, {0})};
    run_everywhere("pack", &Kernels::pack,
                   pack_args(packed.data, packed.scales, rows, static_cast<int64_t>(format), n, k),
                   {&packed.data}, 0);
    return packed;
  }
  const int64_t size = format == Format::q8_0 ? 34 : format == Format::q4_1 ? 20 : 18;
  const int64_t words = format == Format::q8_0 ? 8 : 4, sides = format == Format::q4_1 ? 2 : 1;
  Owned rows = random.bytes({n, k / 32 * size});
  for (int64_t block = 0; block < n * k / 32; ++block)
    for (int64_t side = 0; side < sides; ++side) {
      const uint16_t half = static_cast<uint16_t>(0x2400 + random.bits() % 0x400);  // about 1/64
      std::memcpy(rows.view.as<uint8_t>() + block * size + 2 * side, &half, 2);
    }
  Packed packed{Owned(DType::u8, {groups, k / 32, words, 16, 4}),
                Owned(DType::f16, {groups, k / 32, sides, 16})};
  run_everywhere("pack", &Kernels::pack,
                 pack_args(packed.data, packed.scales, rows, static_cast<int64_t>(format), n, k),
                 {&packed.data, &packed.scales}, 0);
  return packed;
}

// dy times the whole weight, which embedding reads out in the dtype of dy.
void input_gradients(Random& random, Packed& w, int64_t code, int64_t n, int64_t k) {
  Owned ids(DType::i32, {n});
  for (int64_t i = 0; i < n; ++i) ids.view.as<int32_t>()[i] = static_cast<int32_t>(i);
  for (DType dtype : {DType::f32, DType::bf16}) {
    Owned weight(dtype, {n, k});
    run_everywhere("embedding", &Kernels::embedding,
                   quant_embedding_args(weight, ids, w.data, w.scales, code, n), {&weight}, 0);
    for (int64_t m : {1, 5, 30})
      for (bool shared : {false, true}) {
        Owned dy = random.tensor(dtype, {m, n}), dx(DType::f32, {m, k});
        Owned scratch(DType::u8, {(m + 12) * (4 * n + n / 32 * 8 + 64)});
        const QuantMatmulInputGradArgs args = quant_matmul_input_grad_args(
            dx, dy, w.data, w.scales, code, shared ? static_cast<Tensor>(scratch) : Tensor{});
        run_everywhere(
            "quant_matmul_input_grad", &Kernels::quant_matmul_input_grad, args, {&dx}, 1e-4f, [&] {
              for (int64_t i = 0; i < m * k; ++i) {
                double want = 0;
                for (int64_t c = 0; c < n; ++c)
                  want += static_cast<double>(dy.get(i / k * n + c)) * weight.get(c * k + i % k);
                CHECK(std::fabs(dx.get(i) - want) <= 1e-4 * (1 + std::fabs(want)));
              }
            });
      }
  }
}

void quantized() {
  Random random(5);
  for (Format format : {Format::q4_0, Format::q4_1, Format::q8_0})
    for (int64_t n : {1, 16, 35}) {
      const int64_t k = 96, code = static_cast<int64_t>(format);
      Packed w = pack_random(random, format, n, k);
      Owned ids = ints({static_cast<int32_t>(n - 1), 0});
      Owned table(DType::f32, {2, k});
      run_everywhere("embedding", &Kernels::embedding,
                     quant_embedding_args(table, ids, w.data, w.scales, code, n), {&table}, 0);
      input_gradients(random, w, code, n, k);
      for (int activation = 0; activation < 3; ++activation)
        for (int64_t m : {1, 2, 7, 13, 30})
          for (bool shared : {false, true}) {
            const DType dtype = activation == 1 ? DType::bf16 : DType::f32;
            Owned x = random.tensor(dtype, {m, k}), y(DType::f32, {m, n});
            Owned bias = random.tensor(DType::f32, {n});
            Owned scratch(DType::u8, {(m + 12) * (4 * k + k / 32 * 8 + 64)});
            const Tensor none;
            const QuantMatmulArgs args =
                quant_matmul_args(y, x, w.data, w.scales, code, n, bias, activation,
                                  shared ? static_cast<Tensor>(scratch) : none);
            const float bound = activation == 0 ? 0.1f : 2e-4f;
            run_everywhere("quant_matmul", &Kernels::quant_matmul, args, {&y}, 1e-4f, [&] {
              // Row n - 1 of the weight is in the table: one column of y against a plain sum.
              for (int64_t row = 0; row < m; ++row) {
                double want = bias.get(n - 1);
                for (int64_t c = 0; c < k; ++c)
                  want += static_cast<double>(x.get(row * k + c)) * table.get(c);
                CHECK(std::fabs(y.get(row * n + n - 1) - want) <= bound * (1 + std::fabs(want)));
              }
            });
          }
    }
}

// What follows a product: a residual, or the gated activation of rows of gate and of up.
void finished() {
  Random random(7);
  for (Format format : {Format::q4_1, Format::q8_0})
    for (int64_t m : {1, 5, 8, 12, 20}) {
      const int64_t n = 64, k = 96, code = static_cast<int64_t>(format);
      Packed w = pack_random(random, format, n, k);
      Owned x = random.tensor(DType::f32, {m, k}), bias = random.tensor(DType::f32, {n});
      Owned residual = random.tensor(DType::f32, {m, n}), plain(DType::f32, {m, n});
      Owned sum(DType::f32, {m, n}), gated(DType::f32, {m, n / 2});
      run_everywhere("quant_matmul", &Kernels::quant_matmul,
                     quant_matmul_args(plain, x, w.data, w.scales, code, n, bias, 2, {}), {&plain},
                     1e-4f);
      run_everywhere(
          "finished_product", &Kernels::finished_product,
          finished_product_args(sum, x, w.data, w.scales, code, n, bias, 2, {}, residual, 0),
          {&sum}, 1e-4f, [&] {
            for (int64_t i = 0; i < m * n; ++i) {
              const double want = static_cast<double>(plain.get(i)) + residual.get(i);
              CHECK(std::fabs(sum.get(i) - want) <= 1e-3 * (1 + std::fabs(want)));
            }
          });
      run_everywhere("finished_product", &Kernels::finished_product,
                     finished_product_args(gated, x, w.data, w.scales, code, n, bias, 2, {}, {}, 0),
                     {&gated}, 1e-3f, [&] {
                       for (int64_t i = 0; i < m * n / 2; ++i) {
                         const double gate = plain.get(i / 32 * n + i % 32);
                         const double up = plain.get(i / 32 * n + 32 + i % 32);
                         const double want = gate / (1 + std::exp(-gate)) * up;
                         CHECK(std::fabs(gated.get(i) - want) <= 1e-3 * (1 + std::fabs(want)));
                       }
                     });
      // The same from a product in memory.
      Owned sum_after(DType::f32, {m, n}), gated_after(DType::f32, {m, n / 2});
      run_everywhere("finish_product", &Kernels::finish_product,
                     finish_product_args(sum_after, plain, residual, 0), {&sum_after}, 0.f, [&] {
                       for (int64_t i = 0; i < m * n; ++i)
                         CHECK(sum_after.get(i) == plain.get(i) + residual.get(i));
                     });
      run_everywhere("finish_product", &Kernels::finish_product,
                     finish_product_args(gated_after, plain, {}, 0), {&gated_after}, 1e-5f, [&] {
                       for (int64_t i = 0; i < m * n / 2; ++i)
                         CHECK(std::fabs(gated_after.get(i) - gated.get(i)) <= 1e-3);
                     });
    }
}

void dense() {
  Random random(6);
  for (DType dtype : {DType::f32, DType::bf16})
    for (int64_t n : {1, 16, 37})
      for (int64_t k : {1, 31, 66, 96}) {
        const Format format = dtype == DType::bf16 ? Format::bf16 : Format::f32;
        const int64_t code = static_cast<int64_t>(format);
        Packed w = pack_random(random, format, n, k);
        Owned weight = random.tensor(dtype, {n, k});
        for (int64_t m : {1, 5, 8, 12, 20}) {
          Owned x = random.tensor(dtype, {m, k}), y(dtype, {m, n});
          run_everywhere("quant_matmul", &Kernels::quant_matmul,
                         quant_matmul_args(y, x, w.data, w.scales, code, n, {},
                                           dtype == DType::bf16 ? 1 : 2, {}),
                         {&y}, 2e-2f);
          run_everywhere(
              "linear", &Kernels::linear, linear_args(y, x, weight, {}, {}), {&y}, 2e-2f, [&] {
                for (int64_t i = 0; i < m * n; ++i) {
                  double want = 0;
                  for (int64_t c = 0; c < k; ++c)
                    want += static_cast<double>(x.get(i / n * k + c)) * weight.get(i % n * k + c);
                  CHECK(std::fabs(y.get(i) - want) <= 2e-2 * (1 + std::fabs(want)));
                }
              });
        }
      }
}

}  // namespace

void test_products() {
  quantized();
  finished();
  dense();
}

}  // namespace fastllm::test
