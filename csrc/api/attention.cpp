#include "api/attention.h"

#include "common/check.h"

namespace fastllm {

void check_attention_rows(const char* op, const AttentionRows& a, double softcap) {
  check(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, op,
        "H must be a positive multiple of Hk");
  for (int64_t dim : {a.dim, a.value_dim})
    check(dim > 0 && dim % 8 == 0 && dim <= kMaxHeadDim, op,
          "the head dims must be multiples of 8 up to 576");
  check(a.window_left >= -1 && a.window_right >= -1, op,
        "window_left and window_right must be -1 (all keys) or at least 0");
  check(softcap >= 0 && softcap <= 3e38, op, "softcap must be 0 (none) or positive and finite");
}

const float* sinks_of(const char* op, const Tensor& sinks, int64_t heads) {
  check(!sinks.given() || (sinks.ndim == 1 && sinks.dtype == DType::f32 && sinks.contiguous() &&
                           sinks.shape[0] == heads),
        op, "sinks must be contiguous f32 [H]");
  return sinks.as<float>();
}

int64_t partial_floats(const AttentionRows& a, int64_t positions) {
  return (positions + 511) / 512 * a.tokens * a.heads * ((a.value_dim + 15) / 16 * 16 + 16);
}

void check_partials(const char* op, const Tensor& partials, const AttentionRows& a,
                    const Paging& paging) {
  check(!partials.given() ||
            (partials.ndim == 1 && partials.dtype == DType::f32 && partials.contiguous() &&
             partials.shape[0] >= partial_floats(a, paging.table_width * paging.page_size)),
        op, "partials must be f32 [splits * T * H * (Dv rounded up to 16, plus 16)]");
}

namespace {

const char* const op = "attention";

int64_t tokens_of(const Tensor& q) { return q.ndim == 4 ? q.shape[0] * q.shape[1] : q.shape[0]; }
int64_t documents_of(const Tensor& q, const Tensor& cu_seqlens) {
  return cu_seqlens.given() ? cu_seqlens.shape[0] - 1 : q.shape[0];
}
// With few queries a document there are few tasks: the scratch then holds partial results, so that
// splits run on several threads.
bool few_queries(int64_t tokens, int64_t documents) { return tokens <= 4 * documents; }

void check_starts(const Tensor& starts, const char* what) {
  check(
      starts.ndim == 1 && starts.dtype == DType::i32 && starts.contiguous() && starts.shape[0] >= 1,
      op, what);
}

}  // namespace

int64_t attention_scratch(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& cu_seqlens_q) {
  const int rank = cu_seqlens_q.given() ? 3 : 4;
  check(q.ndim == rank && k.ndim == rank && v.ndim == rank, op, "q, k and v must be of one rank");
  const int64_t tokens = tokens_of(q), documents = documents_of(q, cu_seqlens_q);
  const int64_t keys = k.inner(3), heads = q.inner(2), kv_heads = k.inner(2);
  if (tokens == 0 || keys == 0 || documents <= 0 || kv_heads == 0) return 0;
  if (few_queries(tokens, documents)) {
    AttentionRows rows{};
    rows.tokens = tokens, rows.heads = heads, rows.value_dim = v.inner(1);
    return keys > 512 ? partial_floats(rows, keys) : 0;
  }
  // Fewer rows of a KV head than this are one block at every ISA level.
  const int64_t rows = (rank == 4 ? q.shape[1] : tokens) * heads / kv_heads;
  if (rows <= 72) return 0;
  const int64_t tiles = rank == 4 ? documents * ((keys + 63) / 64) : keys / 64 + documents;
  const int64_t floats = q.dtype == DType::bf16 ? 32 : 64;  // per tile and dimension
  return tiles * kv_heads * floats * (k.inner(1) + v.inner(1));
}

AttentionArgs attention_args(Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                             Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor key_mask,
                             Tensor sinks, Tensor scratch, double scale, int64_t window_left,
                             int64_t window_right, double softcap) {
  const bool varlen = cu_seqlens_q.given();
  const int rank = varlen ? 3 : 4;
  check(varlen == cu_seqlens_k.given(), op, "give both cu_seqlens or none");
  for (const Tensor& t : {q, k, v})
    check(t.ndim == rank && is_stored_float(t) && t.dtype == q.dtype && rows_contiguous(t), op,
          "q, k and v must be [B, T, H, D], or [T, H, D] with cu_seqlens, of one float dtype with "
          "contiguous D");
  check(k.inner(3) == v.inner(3) && k.inner(2) == v.inner(2) && q.inner(1) == k.inner(1), op,
        "k and v must agree in keys and heads, q and k in the head dim");
  if (varlen) {
    check_starts(cu_seqlens_q, "cu_seqlens_q must be contiguous int32 [S + 1]");
    check_starts(cu_seqlens_k, "cu_seqlens_k must be contiguous int32 [S + 1]");
    check(cu_seqlens_q.shape[0] == cu_seqlens_k.shape[0], op, "the cu_seqlens must agree in size");
  } else {
    check(q.shape[0] == k.shape[0] && q.shape[0] == v.shape[0], op,
          "q, k and v must agree in batches");
  }
  const int64_t tokens = tokens_of(q), heads = q.inner(2), value_dim = v.inner(1);
  check(o.ndim == rank && o.dtype == q.dtype && o.contiguous() && tokens_of(o) == tokens &&
            o.inner(3) == q.inner(3) && o.inner(2) == heads && o.inner(1) == value_dim,
        op, "o must be contiguous, of q's dtype and shape with the last dimension of v");
  check(lse.ndim == rank - 1 && lse.dtype == DType::f32 && lse.contiguous() &&
            lse.inner(1) == q.inner(3) && lse.inner(2) == heads &&
            (varlen || lse.shape[0] == q.shape[0]),
        op, "lse must be contiguous f32 [B, H, T] or [H, T]");
  if (key_mask.given())
    check(key_mask.ndim == rank - 2 && key_mask.inner(1) == k.inner(3) &&
              rows_contiguous(key_mask) &&
              (key_mask.dtype == DType::boolean || key_mask.dtype == DType::u8) &&
              (varlen || key_mask.shape[0] == k.shape[0]),
          op, "key_mask must be bool [B, Tk] or [Tk] with contiguous keys");
  AttentionArgs a{.rows = {.o = o.data,
                           .lse = lse.as<float>(),
                           .q = {q.data, q.inner_stride(3), q.inner_stride(2)},
                           .sinks = sinks_of(op, sinks, heads),
                           .partials = nullptr,
                           .dtype = q.dtype,
                           .tokens = tokens,
                           .heads = heads,
                           .kv_heads = k.inner(2),
                           .dim = q.inner(1),
                           .value_dim = value_dim,
                           .window_left = near_window(window_left),
                           .window_right = near_window(window_right),
                           .scale = static_cast<float>(scale),
                           .softcap = static_cast<float>(softcap)},
                  .k = {k.data, k.inner_stride(3), k.inner_stride(2)},
                  .v = {v.data, v.inner_stride(3), v.inner_stride(2)},
                  .cu_seqlens_q = cu_seqlens_q.as<int32_t>(),
                  .cu_seqlens_k = cu_seqlens_k.as<int32_t>(),
                  .key_mask = key_mask.as<uint8_t>(),
                  .packed = nullptr,
                  .documents = documents_of(q, cu_seqlens_q),
                  .queries = q.inner(3),
                  .keys = k.inner(3),
                  .q_batch_stride = varlen ? 0 : q.stride[0],
                  .k_batch_stride = varlen ? 0 : k.stride[0],
                  .v_batch_stride = varlen ? 0 : v.stride[0],
                  .mask_batch_stride = varlen || !key_mask.given() ? 0 : key_mask.stride[0]};
  check_attention_rows(op, a.rows, softcap);
  if (scratch.given()) {
    check(scratch.ndim == 1 && scratch.dtype == DType::f32 && scratch.contiguous() &&
              scratch.shape[0] >= attention_scratch(q, k, v, cu_seqlens_q),
          op, "the scratch must be f32 of attention_scratch() elements");
    if (few_queries(tokens, a.documents))
      a.rows.partials = a.keys > 512 ? scratch.as<float>() : nullptr;
    else if (scratch.shape[0] > 0)
      a.packed = scratch.data;
  }
  return a;
}

}  // namespace fastllm
