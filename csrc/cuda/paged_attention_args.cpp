// Checks of paged_attention's arguments on the GPU. Lengths, starts and pages stay in device
// memory: the kernels clamp them.
#include <initializer_list>

#include "common/check.h"
#include "cuda/paged_attention_params.h"

namespace fastllm::cuda {
namespace {

constexpr const char* kOp = "paged_attention (CUDA)";
constexpr double kLog2E = 1.4426950408889634;

bool shaped(const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) {
  if (t.dtype != dtype || t.ndim != static_cast<int>(shape.size())) return false;
  int i = 0;
  for (int64_t n : shape)
    if (t.shape[i++] != n) return false;
  return true;
}
bool aligned(const void* pointer, uintptr_t to) {
  return reinterpret_cast<uintptr_t>(pointer) % to == 0;
}
bool same_strides(const Tensor& a, const Tensor& b) {
  for (int i = 0; i < a.ndim; ++i)
    if (a.stride[i] != b.stride[i]) return false;
  return true;
}

void check_caches(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& k_scales, const Tensor& v_scales, bool alias) {
  const bool codes = k_cache.dtype == DType::i8;
  check(k_cache.ndim == 4 && k_cache.contiguous() && (codes || k_cache.dtype == q.dtype), kOp,
        "k_cache must be contiguous [num_pages, Hk, page_size, D] of q's dtype or int8");
  check(v_cache.ndim == 4 && v_cache.dtype == k_cache.dtype && (alias || v_cache.contiguous()), kOp,
        "v_cache must be contiguous [num_pages, Hk, page_size, Dv] of k_cache's dtype");
  for (int i = 0; i < 3; ++i)
    check(k_cache.shape[i] == v_cache.shape[i], kOp,
          "k_cache and v_cache must agree in pages, heads and page size");
  check(k_cache.shape[1] > 0, kOp, "k_cache has no heads");
  check(k_cache.shape[2] > 0 && k_cache.shape[2] % 16 == 0, kOp,
        "page_size must be a multiple of 16");
  check(aligned(k_cache.data, 16) && aligned(v_cache.data, 16), kOp,
        "the caches must start at multiples of 16 bytes");
  for (const Tensor* t : {&k_scales, &v_scales})
    check(codes ? t->given() && t->contiguous() &&
                      shaped(*t, DType::f32, {k_cache.shape[0], k_cache.shape[1], k_cache.shape[2]})
                : !t->given(),
          kOp,
          "int8 caches, and they alone, take contiguous f32 scales [num_pages, Hk, page_size]");
  const int64_t step = codes ? 16 : 8, limit = alias ? 576 : 256;
  for (const int64_t dim : {k_cache.shape[3], v_cache.shape[3]})
    check(dim > 0 && dim % step == 0 && dim <= limit, kOp,
          "head dims must be multiples of 8 (int8: 16) up to 256");
}

void check_paging(const Tensor& block_table, const Tensor& cu_seqlens,
                  const Tensor& cache_seqlens) {
  check(cache_seqlens.ndim == 1 && cache_seqlens.dtype == DType::i32 && cache_seqlens.contiguous(),
        kOp, "cache_seqlens must be contiguous int32 [S]");
  const int64_t sequences = cache_seqlens.shape[0];
  check(shaped(cu_seqlens, DType::i32, {sequences + 1}) && cu_seqlens.contiguous(), kOp,
        "cu_seqlens_q must be contiguous int32 [S + 1]");
  check(block_table.ndim == 2 &&
            shaped(block_table, DType::i32, {sequences, block_table.shape[1]}) &&
            rows_contiguous(block_table),
        kOp, "block_table must be int32 [S, pages] with contiguous rows");
}

}  // namespace

PagedAttentionCall paged_attention_call(Tensor o, Tensor q, Tensor k_cache, Tensor v_cache,
                                        Tensor block_table, Tensor cu_seqlens, Tensor cache_seqlens,
                                        Tensor k_scales, Tensor v_scales, Tensor sinks,
                                        Tensor partials, double scale, int64_t window_left,
                                        double softcap) {
  check(q.ndim == 3 && rows_contiguous(q) && (q.dtype == DType::bf16 || q.dtype == DType::f16), kOp,
        "q must be bf16 or fp16 [T, H, D] with contiguous D");
  const bool alias = v_cache.data == k_cache.data && v_cache.ndim == 4 && k_cache.ndim == 4 &&
                     same_strides(v_cache, k_cache);
  check_caches(q, k_cache, v_cache, k_scales, v_scales, alias);
  check_paging(block_table, cu_seqlens, cache_seqlens);
  const int64_t tokens = q.shape[0], heads = q.shape[1], kv_heads = k_cache.shape[1];
  check(!alias || (k_cache.dtype == q.dtype && v_cache.shape[3] <= 512), kOp,
        "values that are the first columns of the keys must be of q's dtype, 512 at most");
  check(q.shape[2] == k_cache.shape[3], kOp, "q and k_cache must have the same head dim");
  check(heads > 0 && heads % kv_heads == 0, kOp, "H must be a positive multiple of Hk");
  check(
      shaped(o, q.dtype, {tokens, heads, v_cache.shape[3]}) && o.contiguous() && aligned(o.data, 4),
      kOp, "o must be contiguous [T, H, Dv] of q's dtype");
  check(!sinks.given() || (shaped(sinks, DType::f32, {heads}) && sinks.contiguous()), kOp,
        "sinks must be contiguous f32 [H]");
  check(window_left >= -1, kOp, "window_left must be -1 (no window) or at least 0");
  check(softcap >= 0, kOp, "softcap must be at least 0");
  constexpr int64_t kLimit = (int64_t{1} << 31) - 2 * kSplit;
  check(cache_seqlens.shape[0] <= 65535 && kv_heads <= 65535 && tokens * heads <= kLimit &&
            k_cache.shape[0] * kv_heads * k_cache.shape[2] <= kLimit,
        kOp, "too many sequences, heads, tokens or pages for one launch");

  PagedAttentionCall call{};
  call.dtype = q.dtype;
  call.codes = k_cache.dtype == DType::i8;
  call.alias = alias;
  call.sequences = static_cast<int32_t>(cache_seqlens.shape[0]);
  PagedAttentionParams& p = call.p;
  p.page_size = static_cast<int32_t>(k_cache.shape[2]);
  const int64_t width = block_table.shape[1], most = kLimit / p.page_size;
  p.table_width = static_cast<int32_t>(width < most ? width : most);
  p.capacity = p.table_width * p.page_size;
  p.splits = p.capacity > 0 ? static_cast<int32_t>(divide_up(p.capacity, kSplit)) : 1;
  if (p.splits > 1) {
    const int64_t rows = p.splits * tokens * heads;
    check(shaped(partials, DType::f32, {partials.shape[0]}) && partials.contiguous() &&
              partials.shape[0] >= rows * (v_cache.shape[3] + 2) && aligned(partials.data, 8),
          kOp, "partials must be f32 [splits * T * H * (Dv + 2)]");
    p.partials = partials.as<float>();
    p.stats = p.partials + rows * v_cache.shape[3];
  }
  p.o = o.data;
  p.q = q.data;
  p.k_cache = k_cache.data;
  p.v_cache = v_cache.data;
  p.k_scales = k_scales.as<float>();
  p.v_scales = v_scales.as<float>();
  p.sinks = sinks.as<float>();
  p.block_table = block_table.as<int32_t>();
  p.cu_seqlens = cu_seqlens.as<int32_t>();
  p.cache_seqlens = cache_seqlens.as<int32_t>();
  p.table_stride = block_table.stride[0];
  p.q_token_stride = q.stride[0];
  p.q_head_stride = q.stride[1];
  p.tokens = static_cast<int32_t>(tokens);
  p.num_pages = static_cast<int32_t>(k_cache.shape[0]);
  p.heads = static_cast<int32_t>(heads);
  p.kv_heads = static_cast<int32_t>(kv_heads);
  p.group = static_cast<int32_t>(heads / kv_heads);
  p.dim = static_cast<int32_t>(k_cache.shape[3]);
  p.value_dim = static_cast<int32_t>(v_cache.shape[3]);
  p.window_left = window_left >= p.capacity ? -1 : static_cast<int32_t>(window_left);
  // Rows of int8 are read 32 dimensions at a time, others 16.
  p.k_steps = static_cast<int32_t>(round_up(p.dim, call.codes ? 32 : 16) / 16);
  p.scale_log2 = static_cast<float>(scale * kLog2E);
  if (softcap > 0) {
    p.cap_in = static_cast<float>(2 * kLog2E * scale / softcap);
    p.cap_out = static_cast<float>(softcap * kLog2E);
  }
  p.row_slots = static_cast<int32_t>(row_slots_of(call.sequences, tokens, p.group));
  p.shared = shared_layout(p, call.codes ? 1 : 2, kStages, alias);
  return call;
}

}  // namespace fastllm::cuda
