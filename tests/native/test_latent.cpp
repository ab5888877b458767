// What latent attention needs beside its attention: rows into the compressed cache, and a product
// of its own for every head.
#include "harness.h"

namespace fastllm::test {
namespace {

// Two sequences of 3 and 4 tokens end at positions 18 and 5 of pages of 16; one is dead.
void append() {
  Random random(1);
  const int64_t tokens = 7, latent_dim = 5, rope_dim = 2, columns = latent_dim + rope_dim;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Owned latent = random.tensor(dtype, {tokens, latent_dim});
    Owned key = random.tensor(dtype, {tokens, rope_dim});
    Owned cache(dtype, {4, 16, columns}), table = ints({3, 1, 0, 0, 2, 0});
    table.view.ndim = 2, table.view.shape[0] = 3, table.view.shape[1] = 2;
    table.view.stride[0] = 2, table.view.stride[1] = 1;
    Owned starts = ints({0, 3, 3, 7}), lengths = ints({18, 0, 5});
    run_everywhere("append_mla", &Kernels::append_mla,
                   append_mla_args(latent, key, cache, table, starts, lengths), {&cache}, 0, [&] {
                     for (int64_t t = 0; t < tokens; ++t) {
                       const int64_t position = t < 3 ? 15 + t : t - 2;
                       const int64_t page = t >= 3 ? 2 : position < 16 ? 3 : 1;
                       const int64_t row = (page * 16 + position % 16) * columns;
                       for (int64_t c = 0; c < columns; ++c)
                         CHECK(cache.get(row + c) ==
                               (c < latent_dim ? latent.get(t * latent_dim + c)
                                               : key.get(t * rope_dim + c - latent_dim)));
                     }
                   });
  }
}

void head_products() {
  Random random(2);
  for (DType dtype : {DType::f32, DType::bf16})
    for (int64_t k : {1, 31, 130})
      for (bool with_tail : {false, true}) {
        const int64_t tokens = 9, heads = 3, n = 21, tail_dim = with_tail ? 4 : 0;
        const int64_t width = n + tail_dim;
        Owned x = random.tensor(dtype, {tokens, heads, k});
        Owned weight = random.tensor(dtype, {heads, n, k});
        Owned tail = random.tensor(dtype, {tokens, heads, tail_dim});
        Owned y(dtype, {tokens, heads, width});
        const double tolerance = dtype == DType::f32 ? 1e-5 : 1e-2;
        run_everywhere(
            "head_linear", &Kernels::head_linear,
            head_linear_args(y, x, weight, with_tail ? static_cast<Tensor>(tail) : Tensor{}), {&y},
            static_cast<float>(tolerance), [&] {
              for (int64_t i = 0; i < tokens * heads * width; ++i) {
                const int64_t row = i / width, c = i % width;
                double want = c < n ? 0 : tail.get(row * tail_dim + c - n);
                for (int64_t j = 0; j < k && c < n; ++j)
                  want += static_cast<double>(x.get(row * k + j)) *
                          weight.get((row % heads * n + c) * k + j);
                CHECK(std::fabs(y.get(i) - want) <= tolerance * (1 + std::fabs(want)));
              }
            });
      }
}

}  // namespace

void test_latent() {
  append();
  head_products();
}

}  // namespace fastllm::test
