#include "common/check.h"
#include "ops_core.h"

namespace fastllm {
namespace {

constexpr const char* kOp = "attention_backward";

BatchRows rows_of(const Tensor& t) {
  return {t.data, t.ndim == 4 ? t.stride[0] : 0, t.inner_stride(3), t.inner_stride(2)};
}

bool valid_dim(int64_t dim) { return dim > 0 && dim % 8 == 0 && dim <= kMaxHeadDim; }

void check_rows(const Tensor& t, const Tensor& q, const char* what) {
  check(t.ndim == q.ndim && t.dtype == q.dtype && rows_contiguous(t), kOp, what);
}

// lse, and grad_lse: [H, T] or [B, H, T].
bool is_statistics(const Tensor& t, const Tensor& q) {
  return t.ndim == q.ndim - 1 && t.dtype == DType::f32 && t.inner(1) == q.inner(3) &&
         t.inner(2) == q.inner(2) && (q.ndim == 3 || t.inner(3) == q.inner(4));
}

void check_documents(const Tensor& cu_q, const Tensor& cu_k, int ndim) {
  check(cu_q.given() == cu_k.given() && cu_q.given() == (ndim == 3), kOp,
        "q [T, H, D] comes with cu_seqlens_q and cu_seqlens_k, q [B, T, H, D] without");
  if (!cu_q.given()) return;
  for (const Tensor& cu : {cu_q, cu_k})
    check(cu.ndim == 1 && cu.dtype == DType::i32 && cu.contiguous() && cu.shape[0] >= 1 &&
              cu.shape[0] == cu_q.shape[0],
          kOp, "cu_seqlens_q and cu_seqlens_k must be contiguous int32 [S + 1]");
}

}  // namespace

AttentionBackwardArgs attention_backward_args(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks,
                                              Tensor grad_o, Tensor grad_lse, Tensor q, Tensor k,
                                              Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens_q,
                                              Tensor cu_seqlens_k, Tensor key_mask, Tensor sinks,
                                              Tensor scratch, double scale, int64_t window_left,
                                              int64_t window_right, double softcap) {
  check(
      (q.ndim == 3 || q.ndim == 4) && rows_contiguous(q) && (is_float(q) || q.dtype == DType::f16),
      kOp, "q must be f32, bf16 or f16 [T, H, D] or [B, T, H, D] with contiguous D");
  check_rows(k, q, "k must be [Tk, Hk, D] like q, with contiguous D");
  check_rows(v, q, "v must be [Tk, Hk, Dv] like q, with contiguous Dv");
  check_rows(o, q, "o must be [T, H, Dv] like q, with contiguous Dv");
  check_rows(grad_o, q, "grad_o must be [T, H, Dv] like q, with contiguous Dv");
  const int64_t dim = q.inner(1), value_dim = v.inner(1);
  const int64_t heads = q.inner(2), kv_heads = k.inner(2), queries = q.inner(3), keys = k.inner(3);
  check(valid_dim(dim) && valid_dim(value_dim) && k.inner(1) == dim, kOp,
        "D and Dv must be multiples of 8 up to 576, D the same in q and k");
  check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && v.inner(2) == kv_heads, kOp,
        "H must be a positive multiple of Hk");
  check(
      v.inner(3) == keys && (q.ndim == 3 || (k.shape[0] == q.shape[0] && v.shape[0] == q.shape[0])),
      kOp, "k and v must have the same tokens, q, k and v the same batch");
  check(same_shape(o, grad_o) && o.inner(1) == value_dim && o.inner(2) == heads &&
            o.inner(3) == queries && (q.ndim == 3 || o.shape[0] == q.shape[0]),
        kOp, "o and grad_o must be [T, H, Dv]");
  for (const auto& [grad, of] : {std::pair{&dq, &q}, std::pair{&dk, &k}, std::pair{&dv, &v}})
    check(same_shape(*grad, *of) && grad->dtype == of->dtype && grad->contiguous(), kOp,
          "dq, dk, dv must be contiguous, of the shapes and dtype of q, k, v");
  check(is_statistics(lse, q) && lse.contiguous(), kOp, "lse must be contiguous f32 [H, T]");
  check(!grad_lse.given() || is_statistics(grad_lse, q), kOp, "grad_lse must be f32 [H, T]");
  check_documents(cu_seqlens_q, cu_seqlens_k, q.ndim);
  const int64_t batches = q.ndim == 4 ? q.shape[0] : 1;
  check(!key_mask.given() || (key_mask.dtype == DType::boolean && key_mask.contiguous() &&
                              key_mask.numel() == batches * keys),
        kOp, "key_mask must be contiguous bool [Tk] or [B, Tk]");
  check(!sinks.given() || (sinks.dtype == DType::f32 && sinks.contiguous() &&
                           sinks.numel() == heads && dsinks.given() && dsinks.dtype == DType::f32 &&
                           dsinks.contiguous() && dsinks.numel() == heads),
        kOp, "sinks and dsinks must be contiguous f32 [H]");
  const int64_t documents = cu_seqlens_q.given() ? cu_seqlens_q.shape[0] - 1 : batches;
  const int64_t need =
      attention_backward_scratch(batches, documents, queries, heads, kv_heads, dim);
  check(scratch.given() && scratch.dtype == DType::f32 && scratch.contiguous() &&
            scratch.numel() >= need,
        kOp, "scratch must be f32 of attention_backward_scratch() elements");
  const auto bounded = [](int64_t window) {  // no position is further away
    return window < 0 ? -1 : window < (int64_t{1} << 40) ? window : int64_t{1} << 40;
  };
  float* delta = scratch.as<float>();
  return {.dq = dq.data,
          .dk = dk.data,
          .dv = dv.data,
          .dsinks = dsinks.as<float>(),
          .grad_o = rows_of(grad_o),
          .q = rows_of(q),
          .k = rows_of(k),
          .v = rows_of(v),
          .o = rows_of(o),
          .grad_lse = {grad_lse.data, q.ndim == 4 ? grad_lse.inner_stride(3) : 0,
                       grad_lse.inner_stride(1), grad_lse.inner_stride(2)},
          .lse = lse.as<float>(),
          .cu_seqlens_q = cu_seqlens_q.as<int32_t>(),
          .cu_seqlens_k = cu_seqlens_k.as<int32_t>(),
          .key_mask = key_mask.as<uint8_t>(),
          .sinks = sinks.as<float>(),
          .delta = delta,
          .dq_sums = delta + (batches * heads * queries + 15) / 16 * 16,
          .window_left = bounded(window_left),
          .window_right = bounded(window_right),
          .batches = batches,
          .documents = documents,
          .queries = queries,
          .keys = keys,
          .heads = static_cast<int32_t>(heads),
          .kv_heads = static_cast<int32_t>(kv_heads),
          .dim = static_cast<int32_t>(dim),
          .value_dim = static_cast<int32_t>(value_dim),
          .scale = static_cast<float>(scale),
          .softcap = static_cast<float>(softcap),
          .dtype = q.dtype};
}

int64_t attention_backward_scratch(int64_t batches, int64_t documents, int64_t queries,
                                   int64_t heads, int64_t kv_heads, int64_t dim) {
  const int64_t row = (dim + 15) / 16 * 16;
  const int64_t delta = (batches * heads * queries + 15) / 16 * 16;
  const int64_t of_task = heads / kv_heads * (queries + 7) / 8 * 8 * row;
  if (of_task * 4 <= kThreadGradientBytes) return delta;
  return delta + (batches * queries + 8 * documents) * heads * row;
}

}  // namespace fastllm
