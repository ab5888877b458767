// attention_backward on batches and on packed documents: every variant, one pass and two.
#include "harness.h"

namespace fastllm::test {
namespace {

struct Variant {
  int64_t left, right;
  double softcap;
  bool sinks, masked, grad_lse;
};

// Documents of q and k lengths (5, 9), (0, 3), (70, 70) and 2 rows past their end, or two batches
// of 70 and 75. With one KV head and several threads the second scheme runs.
void one_case(DType dtype, bool packed, int64_t heads, int64_t kv_heads, int64_t dim,
              int64_t value_dim, const Variant& variant) {
  Random random(static_cast<uint64_t>(dim + heads));
  const int64_t batches = packed ? 1 : 2, queries = packed ? 77 : 70, keys = packed ? 84 : 75;
  const auto rows = [&](int64_t tokens, int64_t count, int64_t width) {
    return packed ? random.tensor(dtype, {tokens, count, width})
                  : random.tensor(dtype, {batches, tokens, count, width});
  };
  Owned q = rows(queries, heads, dim), k = rows(keys, kv_heads, dim);
  Owned v = rows(keys, kv_heads, value_dim), o = rows(queries, heads, value_dim);
  Owned grad_o = rows(queries, heads, value_dim);
  Owned dq = rows(queries, heads, dim), dk = rows(keys, kv_heads, dim);
  Owned dv = rows(keys, kv_heads, value_dim);
  const auto statistics = [&] {
    return packed ? random.tensor(DType::f32, {heads, queries})
                  : random.tensor(DType::f32, {batches, heads, queries});
  };
  Owned lse = statistics(), grad_lse = statistics();
  for (int64_t i = 0; i < lse.view.numel(); ++i)
    lse.set(i, i % 11 == 5 ? -INFINITY : lse.get(i) + 5.f);
  Owned cu_q = ints({0, 5, 5, 75}), cu_k = ints({0, 9, 12, 82});
  Owned sinks = random.tensor(DType::f32, {heads}), dsinks(DType::f32, {heads});
  Owned mask(DType::boolean, {batches, keys});
  for (size_t i = 0; i < mask.bytes; ++i) mask.view.as<uint8_t>()[i] = i % 3 != 1;
  const int64_t documents = packed ? 3 : batches;
  const int64_t floats =
      attention_backward_scratch(batches, documents, queries, heads, kv_heads, dim);
  Owned scratch(DType::f32, {floats});
  const Tensor none;
  const auto given = [&](bool use, const Owned& t) { return use ? static_cast<Tensor>(t) : none; };
  run_everywhere(
      "attention_backward", &Kernels::attention_backward,
      attention_backward_args(dq, dk, dv, dsinks, grad_o, given(variant.grad_lse, grad_lse), q, k,
                              v, o, lse, given(packed, cu_q), given(packed, cu_k),
                              given(variant.masked, mask), given(variant.sinks, sinks), scratch,
                              0.1, variant.left, variant.right, variant.softcap),
      {&dq, &dk, &dv, &dsinks}, dtype == DType::f32 ? 1e-4f : 6e-2f, [&] {
        for (int64_t i = 0; i < heads * dim; ++i) {
          CHECK(dq.get(5 * heads * dim + i) == 0.f || (5 + queries * (i / dim)) % 11 != 5);
          CHECK(!packed || dq.get(76 * heads * dim + i) == 0.f);
        }
        for (int64_t i = 0; packed && i < kv_heads * dim; ++i)
          CHECK(dk.get(83 * kv_heads * dim + i) == 0.f);
      });
}

}  // namespace

void test_attention_backward() {
  const Variant causal{-1, 0, 0., false, false, false}, all{30, 4, 2., true, true, true};
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (bool packed : {false, true}) {
      one_case(dtype, packed, 4, 2, 24, 40, causal);
      one_case(dtype, packed, 3, 1, 40, 16, all);
    }
  one_case(DType::bf16, false, 2, 1, 512, 512, causal);
  // dQ of a KV head beyond what a thread keeps: its sums go to the scratch.
  CHECK(attention_backward_scratch(1, 1, 4096, 8, 1, 128) > 8 * 4096 * 128);
}

}  // namespace fastllm::test
