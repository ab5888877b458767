// sampling, log_probs, top_log_probs at odd vocabulary sizes.
#include "harness.h"

namespace fastllm::test {
namespace {

Owned filled(DType dtype, int64_t n, double value) {
  Owned t(dtype, {n});
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == DType::u8)
      t.view.as<uint8_t>()[i] = static_cast<uint8_t>(value);
    else if (dtype == DType::i64)
      t.view.as<int64_t>()[i] = static_cast<int64_t>(value) + i;
    else
      t.set(i, static_cast<float>(value));
  }
  return t;
}

void likelihoods(Random& random, int64_t rows, int64_t vocab) {
  const int64_t tiles = (vocab + 511) / 512;
  Owned logits = random.tensor(DType::f32, {rows, vocab}, 8);
  Owned out(DType::f32, {rows, 2}), scratch(DType::f32, {rows * tiles * 2}),
      ids(DType::i64, {rows, 2});
  for (int64_t i = 0; i < rows * 2; ++i) ids.view.as<int64_t>()[i] = i % 2 ? vocab - 1 : -1;
  run_everywhere("log_probs", &Kernels::log_probs, log_probs_args(out, scratch, logits, ids),
                 {&out}, 1e-5f, [&] {
                   for (int64_t row = 0; row < rows; ++row) {
                     double sum = 0;
                     for (int64_t c = 0; c < vocab; ++c)
                       sum += std::exp(logits.get(row * vocab + c));
                     const double want = logits.get(row * vocab + vocab - 1) - std::log(sum);
                     CHECK(std::isnan(out.get(2 * row)));
                     CHECK(std::fabs(out.get(2 * row + 1) - want) < 1e-5);
                   }
                 });
  for (int64_t k : {int64_t{1}, vocab / 2, vocab}) {
    Owned values(DType::f32, {rows, k}), top(DType::i32, {rows, k});
    run_everywhere(
        "top_log_probs", &Kernels::top_log_probs, top_log_probs_args(values, top, scratch, logits),
        {&values, &top}, 1e-5f, [&] {
          for (int64_t i = 0; i < rows * k; ++i) {
            if (i % k == 0) continue;
            const int32_t* id = top.view.as<int32_t>() + i;
            const float* row = logits.view.as<float>() + i / k * vocab;
            CHECK(row[id[-1]] > row[id[0]] || (row[id[-1]] == row[id[0]] && id[-1] < id[0]));
          }
        });
  }
}

void draws(Random& random, int64_t rows, int64_t vocab, float temperature, int top_k, float top_p,
           float min_p, bool penalized) {
  const int64_t tiles = (vocab + 511) / 512, counted = penalized ? rows : 0;
  Owned logits = random.tensor(DType::f32, {rows, vocab}, 6);
  Owned ids(DType::i32, {rows}), logprob(DType::f32, {rows}), logprob_t(DType::f32, {rows});
  Owned scratch(DType::f32, {rows * (tiles * 6 + 1)}), counts(DType::i32, {counted, vocab});
  Owned in_prompt(DType::u8, {counted, vocab}), banned(DType::i32, {rows, 2});
  for (int64_t i = 0; i < rows * 2; ++i) banned.set(i, i % 2 && vocab > 1 ? 0.f : -1.f);
  Owned t = filled(DType::f32, rows, temperature), k = filled(DType::i32, rows, top_k);
  Owned p = filled(DType::f32, rows, top_p), m = filled(DType::f32, rows, min_p);
  Owned repetition = filled(DType::f32, rows, 1.2), presence = filled(DType::f32, rows, 0.1);
  Owned frequency = filled(DType::f32, rows, 0.1), seed = filled(DType::i64, rows, 99);
  Owned position = filled(DType::i32, rows, 5), use = filled(DType::u8, rows, penalized);
  run_everywhere("sampling", &Kernels::sampling,
                 sampling_args(ids, logprob, logprob_t, scratch, logits, t, k, p, m, repetition,
                               presence, frequency, seed, position, use, counts, in_prompt, banned),
                 {&ids, &logprob, &logprob_t, &counts}, 1e-5f, [&] {
                   for (int64_t row = 0; row < rows; ++row) {
                     const int32_t id = ids.view.as<int32_t>()[row];
                     CHECK(id >= (vocab > 1 ? 1 : 0) && id < vocab);  // id 0 is banned
                     CHECK(logprob.get(row) <= 0 && logprob_t.get(row) <= 0);
                     if (penalized) CHECK(counts.view.as<int32_t>()[row * vocab + id] == 1);
                   }
                 });
}

}  // namespace

void test_sampling() {
  Random random(8);
  for (int64_t vocab : {1, 2, 17, 511, 512, 513, 1537}) {
    likelihoods(random, 3, vocab);
    draws(random, 3, vocab, 0, 0, 1, 0, false);
    draws(random, 3, vocab, 0, 0, 1, 0, true);
    draws(random, 3, vocab, 1, 0, 1, 0, false);
    draws(random, 3, vocab, 0.7f, 4, 0.9f, 0.01f, true);
    draws(random, 2, vocab, 2, 0, 0.5f, 0, false);
  }
}

}  // namespace fastllm::test
