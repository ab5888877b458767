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
  run_everywhere(
      "append_kv", &Kernels::append_kv,
      append_kv_args(k, v, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens, none, none),
      {&k_cache, &v_cache}, 0);
  Owned partials(DType::f32, {2 * tokens * heads * ((dim + 15) / 16 * 16 + 16)});
  std::vector<float> single;
  for (bool split : {false, true}) {
    run_everywhere("paged_attention", &Kernels::paged_attention,
                   paged_attention_args(
                       o, q, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens, none, none,
                       none, split ? static_cast<Tensor>(partials) : none, 0.2, window, 0.),
                   {&o}, close, [&] {
                     for (int64_t i = 0; i < heads * dim; ++i)
                       CHECK(o.get(3 * heads * dim + i) == 0.f);
                     for (int64_t i = 0; i < tokens * heads * dim; ++i)
                       CHECK(std::fabs(o.get(i)) <= 1.01f);  // an average of values within [-1, 1]
                   });
    for (int64_t i = 0; i < tokens * heads * dim; ++i) {
      if (!split) single.push_back(o.get(i));
      CHECK(o.get(i) == single[static_cast<size_t>(i)]);  // partials do not change the bits
    }
  }
}

// paged_attention over caches of every type, with sinks and a softcap.
void one_cache(DType dtype, DType cache_dtype) {
  Random random(3);
  const int64_t tokens = 5, heads = 4, kv_heads = 2, dim = 40, value_dim = 24, pages = 9;
  const float close = dtype == DType::f32 ? 1e-4f : 3e-2f;
  Owned block_table = ints({0, 1, 2, 3, 4, 5, 6, 7, 8});
  block_table.view.ndim = 2;
  block_table.view.shape[0] = 1, block_table.view.shape[1] = pages;
  block_table.view.stride[0] = pages, block_table.view.stride[1] = 1;
  Owned cu_seqlens = ints({0, 5}), cache_seqlens = ints({551});
  Owned q = random.tensor(dtype, {tokens, heads, dim}), o(dtype, {tokens, heads, value_dim});
  Owned k_cache = random.tensor(cache_dtype, {pages, kv_heads, 64, dim});
  Owned v_cache = random.tensor(cache_dtype, {pages, kv_heads, 64, value_dim});
  Owned k_scales = random.tensor(DType::f32, {pages, kv_heads, 64}, 1.f / 127);
  Owned v_scales = random.tensor(DType::f32, {pages, kv_heads, 64}, 1.f / 127);
  Owned sinks = random.tensor(DType::f32, {heads});
  const bool coded = cache_dtype == DType::i8;
  const Tensor none;
  run_everywhere(
      "paged_attention", &Kernels::paged_attention,
      paged_attention_args(o, q, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens,
                           coded ? static_cast<Tensor>(k_scales) : none,
                           coded ? static_cast<Tensor>(v_scales) : none, sinks, none, 0.2, 530, 3.),
      {&o}, close);
}

// mla_attention over natural rows, its splits in one task or in parallel, to the same bits.
void latent(DType dtype) {
  Random random(5);
  const int64_t tokens = 3, heads = 5, columns = 40, value_dim = 24, pages = 9;
  const float close = dtype == DType::f32 ? 1e-4f : 3e-2f;
  Owned block_table = ints({8, 7, 6, 5, 4, 3, 2, 1, 0});
  block_table.view.ndim = 2;
  block_table.view.shape[0] = 1, block_table.view.shape[1] = pages;
  block_table.view.stride[0] = pages, block_table.view.stride[1] = 1;
  Owned cu_seqlens = ints({0, 3}), cache_seqlens = ints({530});
  Owned q = random.tensor(dtype, {tokens, heads, columns}), o(dtype, {tokens, heads, value_dim});
  Owned cache = random.tensor(dtype, {pages, 64, columns});
  Owned partials(DType::f32, {2 * tokens * heads * (32 + 16)});
  const Tensor none;
  std::vector<float> first;
  for (bool split : {false, true}) {
    run_everywhere("mla_attention", &Kernels::mla_attention,
                   mla_attention_args(o, q, cache, block_table, cu_seqlens, cache_seqlens,
                                      split ? static_cast<Tensor>(partials) : none, value_dim, 0.2),
                   {&o}, close);
    for (int64_t i = 0; i < o.view.numel(); ++i) {
      if (!split) first.push_back(o.get(i));
      CHECK(o.get(i) == first[static_cast<size_t>(i)]);
    }
  }
}

// attention on batches and on packed documents, with and without scratch, to the same bits.
void dense(DType dtype, bool packed, int64_t queries, int64_t keys, int64_t dim, int64_t value_dim,
           int64_t left, int64_t right) {
  Random random(11);
  const int64_t heads = 4, kv_heads = 2, batch = 2;
  const float close = dtype == DType::f32 ? 1e-4f : 3e-2f;
  Owned q = random.tensor(dtype, {batch, queries, heads, dim});
  Owned k = random.tensor(dtype, {batch, keys, kv_heads, dim});
  Owned v = random.tensor(dtype, {batch, keys, kv_heads, value_dim});
  Owned o(dtype, {batch, queries, heads, value_dim}), lse(DType::f32, {batch, heads, queries});
  Owned sinks = random.tensor(DType::f32, {heads}), mask = random.bytes({batch, keys});
  for (size_t i = 0; i < mask.bytes; ++i) mask.view.as<uint8_t>()[i] %= 3;
  Owned cu_q = ints({0, static_cast<int32_t>(queries) / 2, static_cast<int32_t>(2 * queries) - 1});
  Owned cu_k = ints({0, static_cast<int32_t>(keys) + 3, static_cast<int32_t>(2 * keys)});
  Tensor none, starts_q, starts_k;
  const auto flatten = [](Owned& t) {
    t.view.shape[1] *= t.view.shape[0];
    for (int i = 0; i + 1 < t.view.ndim; ++i) t.view.shape[i] = t.view.shape[i + 1];
    for (int i = 0; i + 1 < t.view.ndim; ++i) t.view.stride[i] = t.view.stride[i + 1];
    --t.view.ndim;
  };
  if (packed) {
    for (Owned* t : {&q, &k, &v, &o, &mask}) flatten(*t);
    lse = Owned(DType::f32, {heads, batch * queries});
    starts_q = cu_q, starts_k = cu_k;
  }
  Owned scratch(DType::f32, {attention_scratch(q, k, v, starts_q)});
  std::vector<float> first;
  for (bool with : {true, false}) {
    run_everywhere("attention", &Kernels::attention,
                   attention_args(o, lse, q, k, v, starts_q, starts_k, mask, sinks,
                                  with ? static_cast<Tensor>(scratch) : none, 0.3, left, right, 4.),
                   {&o, &lse}, close);
    for (int64_t i = 0; i < o.view.numel(); ++i) {
      if (with) first.push_back(o.get(i));
      CHECK(std::fabs(o.get(i)) <= 1.01f && o.get(i) == first[static_cast<size_t>(i)]);
    }
  }
}

}  // namespace

void test_attention() {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    one_cache(dtype, dtype);
    one_cache(dtype, DType::i8);
    latent(dtype);
    for (bool packed : {false, true}) {
      dense(dtype, packed, 3, 600, 24, 16, -1, 0);
      dense(dtype, packed, 70, 65, 40, 40, 20, 9);
    }
  }
  for (DType dtype : {DType::f32, DType::bf16}) {
    one_shape(dtype, 8, 1, 1, -1);
    one_shape(dtype, 24, 6, 2, -1);
    one_shape(dtype, 64, 3, 3, 40);
  }
}

}  // namespace fastllm::test
