#include <stdexcept>
#include <string>

#include "api/paging.h"
#include "api/rope.h"
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

Paging paging_of(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& block_table, const Tensor& cu_seqlens, const Tensor& cache_seqlens,
                 int64_t tokens) {
  check(k_cache.ndim == 4 && v_cache.ndim == 4 && v_cache.dtype == k_cache.dtype &&
            (is_stored_float(k_cache) || k_cache.dtype == DType::i8),
        op,
        "k_cache and v_cache must be f32, bf16, f16 or int8 [num_pages, kv_heads, page_size, "
        "head_dim]");
  for (int i = 0; i < 3; ++i)
    check(k_cache.shape[i] == v_cache.shape[i], op,
          "k_cache and v_cache must agree in pages, heads and page size");
  check(k_cache.contiguous() && v_cache.contiguous(), op, "the caches must be contiguous");
  check(k_cache.shape[1] > 0, op, "k_cache has no heads");
  check(k_cache.shape[2] > 0 && k_cache.shape[2] % 64 == 0, op,
        "page_size must be a multiple of 64, the tile of the kernels");
  check(k_cache.shape[3] > 0 && k_cache.shape[3] % 2 == 0 && k_cache.shape[3] <= kMaxHeadDim &&
            v_cache.shape[3] > 0 && v_cache.shape[3] <= kMaxHeadDim,
        op, "the head dims must lie between 1 and 512, that of K even");
  check(cache_seqlens.ndim == 1 && cache_seqlens.dtype == DType::i32 && cache_seqlens.contiguous(),
        op, "cache_seqlens must be contiguous int32 [S]");
  const int64_t sequences = cache_seqlens.shape[0];
  check(cu_seqlens.ndim == 1 && cu_seqlens.dtype == DType::i32 && cu_seqlens.contiguous() &&
            cu_seqlens.shape[0] == sequences + 1,
        op, "cu_seqlens_q must be contiguous int32 [S + 1]");
  check(block_table.ndim == 2 && block_table.dtype == DType::i32 &&
            block_table.shape[0] == sequences && rows_contiguous(block_table),
        op, "block_table must be int32 [S, pages] with contiguous rows");
  return {.block_table = block_table.as<int32_t>(),
          .cu_seqlens = cu_seqlens.as<int32_t>(),
          .cache_seqlens = cache_seqlens.as<int32_t>(),
          .sequences = sequences,
          .table_width = block_table.shape[1],
          .table_stride = block_table.stride[0],
          .tokens = tokens,
          .num_pages = k_cache.shape[0],
          .page_size = k_cache.shape[2]};
}

void check_scales(const char* op, const Tensor& k_cache, const Tensor& k_scales,
                  const Tensor& v_scales) {
  const bool quantized = k_cache.dtype == DType::i8;
  check(k_scales.given() == quantized && v_scales.given() == quantized, op,
        "k_scales and v_scales belong to int8 caches and to no others");
  if (!quantized) return;
  for (const Tensor* scales : {&k_scales, &v_scales}) {
    check(scales->ndim == 3 && scales->dtype == DType::f32 && scales->contiguous(), op,
          "k_scales and v_scales must be contiguous f32 [num_pages, kv_heads, page_size]");
    for (int i = 0; i < 3; ++i)
      check(scales->shape[i] == k_cache.shape[i], op,
            "k_scales and v_scales must have the pages, heads and page size of k_cache");
  }
}

namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}
int64_t value_at(const Tensor& t, int64_t i) { return t.as<int32_t>()[i * t.stride[0]]; }

void check_sequence(const Tensor& block_table, int64_t s, int64_t length, int64_t new_tokens,
                    int64_t num_pages, int64_t page_size) {
  const int64_t width = block_table.shape[1];
  if (length < new_tokens || length > width * page_size)
    throw std::invalid_argument(
        "cache_seqlens[" + std::to_string(s) + "] is " + std::to_string(length) +
        ": it must hold the " + std::to_string(new_tokens) + " new tokens and fit the " +
        std::to_string(width) + " pages of block_table (0 marks a dead slot)");
  const int32_t* row = block_table.as<int32_t>() + s * block_table.stride[0];
  for (int64_t i = 0; i * page_size < length; ++i) {
    const int64_t page = row[i * block_table.stride[1]];
    if (page < 0 || page >= num_pages)
      throw std::invalid_argument("block_table[" + std::to_string(s) + "] names page " +
                                  std::to_string(page) + ", but the cache has pages 0 to " +
                                  std::to_string(num_pages - 1));
  }
}

}  // namespace

void check_paging_values(const Tensor& block_table, const Tensor& cu_seqlens,
                         const Tensor& cache_seqlens, int64_t tokens, int64_t num_pages,
                         int64_t page_size) {
  for (const Tensor* t : {&block_table, &cu_seqlens, &cache_seqlens})
    require(t->dtype == DType::i32, "block_table, cu_seqlens_q and cache_seqlens must be int32");
  const int64_t sequences = cache_seqlens.shape[0];
  require(block_table.ndim == 2 && block_table.shape[0] == sequences && cu_seqlens.ndim == 1 &&
              cu_seqlens.shape[0] == sequences + 1 && cache_seqlens.ndim == 1 && page_size > 0,
          "block_table, cu_seqlens_q and cache_seqlens must have shapes [S, P], [S + 1] and [S]");
  int64_t begin = value_at(cu_seqlens, 0);
  bool rising = begin == 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t end = value_at(cu_seqlens, s + 1), length = value_at(cache_seqlens, s);
    rising = rising && end >= begin;
    if (rising && length != 0)
      check_sequence(block_table, s, length, end - begin, num_pages, page_size);
    begin = end;
  }
  require(rising && begin == tokens,
          "cu_seqlens_q must rise from 0 to the " + std::to_string(tokens) + " tokens given");
}

namespace {

Rows rows_of(const char* op, const Tensor& t, const Tensor& cache, DType dtype, int64_t tokens,
             const char* what) {
  check(t.ndim == 3 && t.dtype == dtype && rows_contiguous(t) && t.shape[0] == tokens &&
            t.shape[1] == cache.shape[1] && t.shape[2] == cache.shape[3],
        op, what);
  return {t.data, t.stride[0], t.stride[1]};
}

KvTarget target_of(const char* op, const Tensor& k, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& block_table, const Tensor& cu_seqlens, const Tensor& cache_seqlens,
                   const Tensor& k_scales, const Tensor& v_scales) {
  check(k.ndim == 3 && is_stored_float(k), op, "k must be f32, bf16 or f16 [T, Hk, D]");
  const Paging paging =
      paging_of(op, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens, k.shape[0]);
  check(k_cache.dtype == DType::i8 || k_cache.dtype == k.dtype, op,
        "k must be of the cache's dtype");
  check_scales(op, k_cache, k_scales, v_scales);
  return {.k_cache = k_cache.data,
          .v_cache = v_cache.data,
          .k_scales = k_scales.as<float>(),
          .v_scales = v_scales.as<float>(),
          .paging = paging,
          .dtype = k.dtype,
          .kv_heads = k_cache.shape[1],
          .dim = k_cache.shape[3],
          .value_dim = v_cache.shape[3]};
}

constexpr const char* kBadK = "k must be [T, Hk, D] as the cache is, with contiguous D";
constexpr const char* kBadV = "v must be [T, Hk, Dv] as the cache is, of k's dtype, Dv contiguous";

}  // namespace

AppendKvArgs append_kv_args(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor block_table,
                            Tensor cu_seqlens, Tensor cache_seqlens, Tensor k_scales,
                            Tensor v_scales) {
  const char* op = "append_kv";
  const KvTarget to = target_of(op, k, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens,
                                k_scales, v_scales);
  return {.to = to,
          .k = rows_of(op, k, k_cache, to.dtype, to.paging.tokens, kBadK),
          .v = rows_of(op, v, v_cache, to.dtype, to.paging.tokens, kBadV)};
}

RopeAppendKvArgs rope_append_kv_args(Tensor q_out, Tensor q, Tensor k, Tensor v, Tensor positions,
                                     Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache,
                                     Tensor block_table, Tensor cu_seqlens, Tensor cache_seqlens,
                                     Tensor k_scales, Tensor v_scales) {
  const char* op = "rope_append_kv";
  const KvTarget to = target_of(op, k, k_cache, v_cache, block_table, cu_seqlens, cache_seqlens,
                                k_scales, v_scales);
  const int64_t tokens = to.paging.tokens;
  check(q.ndim == 3 && rows_contiguous(q) && q.dtype == to.dtype && q.shape[0] == tokens &&
            q.shape[2] == to.dim,
        op, "q must be [T, H, D] of k's dtype, tokens and head dim, with contiguous D");
  check(same_shape(q_out, q) && q_out.dtype == q.dtype && q_out.contiguous(), op,
        "q_out must be contiguous, shaped and typed like q");
  check_rope_tables(op, positions, cos, sin, tokens, to.dim);
  return {.to = to,
          .q = {q.data, q.stride[0], q.stride[1]},
          .k = rows_of(op, k, k_cache, to.dtype, tokens, kBadK),
          .v = rows_of(op, v, v_cache, to.dtype, tokens, kBadV),
          .q_out = q_out.data,
          .positions = positions.as<int32_t>(),
          .cos = cos.as<float>(),
          .sin = sin.as<float>(),
          .heads = q.shape[1],
          .half = cos.shape[1],
          .table_rows = cos.shape[0]};
}

}  // namespace fastllm
