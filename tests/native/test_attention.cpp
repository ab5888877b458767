// append_kv, rope_append_kv, paged_attention over a shuffled block table, with a dead slot.
#include "harness.h"

namespace fastllm::test {
namespace {

void one_shape(DType dtype, int64_t dim, int64_t heads, int64_t kv_heads, int64_t window) {
  Random random(7 + static_cast<uint64_t>(dim));
  // Three sequences of 70, 0 (dead) and 600 tokens in the cache; 3, 1 and 2 of them are new.
  const int64_t tokens = 6, pages = 14, page = 64, table_width = 10;
  Owned block_table(DType::i32, {3, table_width});
  int32_t next = 13;
  for (int64_t i = 0; i < 2; ++i) block_table.set(i, static_cast<float>(next--));
  for (int64_t i = 0; i < 10; ++i) block_table.set(2 * table_width + i, static_cast<float>(next--));
  Owned cu_seqlens = ints({0, 3, 4, 6}), cache_seqlens = ints({70, 0, 600});
  Owned positions = ints({67, 68, 69, 0, 598, 599});
  Owned q = random.tensor(dtype, {tokens, heads, dim}), o(dtype, {tokens, heads, dim});
  Owned k = random.tensor(dtype, {tokens, kv_heads, dim}),
        v = random.tensor(dtype, {tokens, kv_heads, dim});
  Owned k_cache = random.tensor(dtype, {pages, kv_heads, page, dim});
  Owned v_cache = random.tensor(dtype, {pages, kv_heads, page, dim});
  const int64_t half = dim / 2;
  Owned cos = random.tensor(DType::f32, {600, half}), sin = random.tensor(DType::f32, {600, half});
  Owned rotated(dtype, {tokens, heads, dim});
  const Tensor none;
  const float close = dtype == DType::f32 ? 1e-4f : 3e-2f;

  run_everywhere("rope_append_kv", &Kernels::rope_append_kv,
                 rope_append_kv_args(rotated, q, k, v, positions, cos, sin, k_cache, v_cache,
                                     block_table, cu_seqlens, cache_seqlens, none, none),
                 {&rotated, &k_cache, &v_cache}, close);
  run_everywhere("append_kv", &Kernels::append_kv,
                 append_kv_args(k, v, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens, none,
                                none),
                 {&k_cache, &v_cache}, 0);
  Owned partials(DType::f32, {2 * tokens * heads * ((dim + 15) / 16 * 16 + 16)});
  std::vector<float> single;
  for (bool split : {false, true}) {
    run_everywhere(
        "paged_attention", &Kernels::paged_attention,
        paged_attention_args(o, q, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens,
                             split ? static_cast<Tensor>(partials) : none, 0.2, window),
        {&o}, close, [&] {
          for (int64_t i = 0; i < heads * dim; ++i) CHECK(o.get(3 * heads * dim + i) == 0.f);
          for (int64_t i = 0; i < tokens * heads * dim; ++i)
            CHECK(std::fabs(o.get(i)) <= 1.01f);  // an average of values within [-1, 1]
        });
    for (int64_t i = 0; i < tokens * heads * dim; ++i) {
      if (!split) single.push_back(o.get(i));
      CHECK(o.get(i) == single[static_cast<size_t>(i)]);  // partials do not change the bits
    }
  }
}

}  // namespace

void test_attention() {
  for (DType dtype : {DType::f32, DType::bf16}) {
    one_shape(dtype, 8, 1, 1, -1);
    one_shape(dtype, 24, 6, 2, -1);
    one_shape(dtype, 64, 3, 3, 40);
  }
}

}  // namespace fastllm::test
