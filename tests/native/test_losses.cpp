// Rows of logits become losses, divergences and gradients; the products that gradients are made of.
// Odd sizes, against scalar formulas in double.
#include "harness.h"

namespace fastllm::test {
namespace {

bool close(double got, double want, double tolerance) {
  return std::fabs(got - want) <= tolerance * (1 + std::fabs(want));
}

// Log-probabilities in double of one row.
std::vector<double> log_softmax(const std::vector<double>& z) {
  const double largest = *std::max_element(z.begin(), z.end());
  double sum = 0;
  for (double v : z) sum += std::exp(v - largest);
  std::vector<double> out;
  for (double v : z) out.push_back(v - largest - std::log(sum));
  return out;
}

std::vector<double> row_of(const Owned& t, int64_t row, int64_t columns) {
  std::vector<double> z;
  for (int64_t c = 0; c < columns; ++c) z.push_back(t.get(row * columns + c));
  return z;
}

void cross_entropies() {
  Random random(1);
  for (int64_t columns : {1, 17, 512, 1100})
    for (double softcap : {0.0, 3.0})
      for (DType gradient : {DType::f32, DType::bf16}) {
        const int64_t rows = 5;
        Owned logits = random.tensor(DType::f32, {rows, columns}, 4);
        std::vector<std::vector<double>> capped, slopes;
        for (int64_t row = 0; row < rows; ++row) {
          capped.push_back(row_of(logits, row, columns));
          slopes.emplace_back(columns, 1.0);
          for (int64_t c = 0; c < columns && softcap > 0; ++c) {
            const double t = std::tanh(capped[row][c] / softcap);
            capped[row][c] = softcap * t, slopes[row][c] = 1 - t * t;
          }
        }
        Owned targets(DType::i32, {rows}), loss(DType::f32, {rows}), lse(DType::f32, {rows});
        for (int64_t row = 0; row < rows; ++row)
          targets.view.as<int32_t>()[row] = static_cast<int32_t>(row * 7 % columns);
        Owned d(gradient, {rows, columns});
        const LossRowsArgs args =
            cross_entropy_rows_args(loss, lse, d, logits, targets, softcap, 0, 0, 0.5);
        const double tolerance = gradient == DType::f32 ? 1e-5 : 8e-3;
        run_everywhere("loss_rows", &Kernels::loss_rows, args, {&loss, &lse, &d, &logits},
                       static_cast<float>(tolerance), [&] {
                         for (int64_t row = 0; row < rows; ++row) {
                           const std::vector<double> logp = log_softmax(capped[row]);
                           const int64_t target = row * 7 % columns;
                           CHECK(close(loss.get(row), -logp[target], 1e-5));
                           for (int64_t c = 0; c < columns; ++c) {
                             const double p = std::exp(logp[c]) - (c == target);
                             const double want = 0.5 * p * slopes[row][c];
                             CHECK(close(d.get(row * columns + c), want, tolerance));
                           }
                         }
                       });
      }
}

void divergences() {
  Random random(2);
  for (int64_t columns : {1, 17, 512, 1100}) {
    const int64_t rows = 3;
    Owned logits = random.tensor(DType::f32, {rows, columns}, 3);
    Owned teacher = random.tensor(DType::f32, {rows, columns}, 3);
    Owned out(DType::f32, {rows}), lse(DType::f32, {rows}), d(DType::f32, {rows, columns});
    Owned grad = random.tensor(DType::f32, {rows});
    const KlRowsArgs args = kl_rows_args(out, lse, d, grad, logits, teacher, 1, 0, 0,
                                         static_cast<int64_t>(DivergenceKind::forward), 0.5);
    std::vector<std::vector<double>> student, wanted;
    for (int64_t row = 0; row < rows; ++row) {
      student.push_back(log_softmax(row_of(logits, row, columns)));
      wanted.push_back(log_softmax(row_of(teacher, row, columns)));
    }
    run_everywhere("kl_rows", &Kernels::kl_rows, args, {&out, &lse, &d, &logits, &teacher}, 1e-4f,
                   [&] {
                     for (int64_t row = 0; row < rows; ++row) {
                       double sum = 0;
                       for (int64_t c = 0; c < columns; ++c) {
                         const double p = std::exp(wanted[row][c]), q = std::exp(student[row][c]);
                         sum += p * (wanted[row][c] - student[row][c]);
                         CHECK(close(d.get(row * columns + c), grad.get(row) * (q - p), 1e-5));
                       }
                       CHECK(close(out.get(row), sum, 1e-5));
                     }
                   });
  }
}

void products() {
  Random random(3);
  struct Size {
    int64_t m, n, k;
  };
  for (const Size s : {Size{1, 1, 1}, Size{5, 17, 33}, Size{13, 40, 1100}, Size{30, 1030, 520}})
    for (DType dtype : {DType::f32, DType::bf16})
      for (bool transposed : {false, true})
        for (bool add : {false, true}) {
          Owned a =
              transposed ? random.tensor(dtype, {s.k, s.m}) : random.tensor(dtype, {s.m, s.k});
          Owned b = random.tensor(dtype, {s.k, s.n}), y = random.tensor(DType::f32, {s.m, s.n});
          Owned scratch(DType::u8, {gradient_product_scratch(s.n, s.k, transposed)});
          std::vector<double> want(s.m * s.n);
          for (int64_t i = 0; i < s.m * s.n; ++i) {
            const int64_t row = i / s.n, column = i % s.n;
            want[i] = add ? y.get(i) : 0;
            for (int64_t k = 0; k < s.k; ++k)
              want[i] += static_cast<double>(a.get(transposed ? k * s.m + row : row * s.k + k)) *
                         b.get(k * s.n + column);
          }
          run_everywhere("gradient_product", &Kernels::gradient_product,
                         gradient_product_args(y, a, b, scratch, transposed, add), {&y}, 1e-4f,
                         [&] {
                           for (int64_t i = 0; i < s.m * s.n; ++i)
                             CHECK(close(y.get(i), want[i], 1e-4));
                         });
        }
}

void sums_of_columns() {
  Random random(4);
  for (DType dtype : {DType::f32, DType::bf16})
    for (int64_t columns : {1, 17, 100})
      for (bool add : {false, true}) {
        const int64_t rows = 37;
        Owned x = random.tensor(dtype, {rows, columns}), y = random.tensor(DType::f32, {columns});
        std::vector<double> want(columns);
        for (int64_t c = 0; c < columns; ++c) want[c] = add ? y.get(c) : 0;
        for (int64_t i = 0; i < rows * columns; ++i) want[i % columns] += x.get(i);
        run_everywhere("column_sums", &Kernels::column_sums, column_sums_args(y, x, add), {&y},
                       1e-5f, [&] {
                         for (int64_t c = 0; c < columns; ++c)
                           CHECK(close(y.get(c), want[c], 1e-5));
                       });
      }
}

}  // namespace

void test_losses() {
  cross_entropies();
  divergences();
  products();
  sums_of_columns();
}

}  // namespace fastllm::test
