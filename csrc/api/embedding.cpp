#include "api/packed.h"
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {
namespace {

EmbeddingArgs common_args(const Tensor& y, const Tensor& ids, int64_t k, const char* op) {
  check(ids.contiguous() && (ids.dtype == DType::i32 || ids.dtype == DType::i64), op,
        "ids must be contiguous int32 or int64");
  check(y.given() && is_float(y) && y.contiguous() && y.numel() == ids.numel() * k, op,
        "y must be f32 or bf16, contiguous, with a row of k columns for each id");
  EmbeddingArgs a{};
  a.y = y.data;
  a.ids = ids.data;
  a.y_type = y.dtype;
  a.ids_type = ids.dtype;
  a.count = ids.numel();
  a.k = k;
  return a;
}

}  // namespace

EmbeddingArgs embedding_args(Tensor y, Tensor ids, Tensor weight) {
  const char* op = "embedding";
  check(weight.ndim == 2 && rows_contiguous(weight), op, "weight must be [n, k], rows contiguous");
  check(is_float(weight) || weight.dtype == DType::f16, op, "weight must be f32, bf16 or f16");
  EmbeddingArgs a = common_args(y, ids, weight.shape[1], op);
  a.data = weight.data;
  a.data_type = weight.dtype;
  a.n = weight.shape[0];
  a.row_stride = weight.stride[0];
  return a;
}

EmbeddingArgs quant_embedding_args(Tensor y, Tensor ids, Tensor data, Tensor scales,
                                   int64_t format_code, int64_t n) {
  const char* op = "quant_embedding";
  const Format format = parse_format(format_code, op);
  check(data.ndim >= 3, op, "data must be packed");
  const int64_t k = data.shape[1] * (format == Format::f32 ? 1 : format == Format::bf16 ? 2 : 32);
  check_packed(data, scales, format, n, k, op);
  EmbeddingArgs a = common_args(y, ids, k, op);
  a.data = data.data;
  a.scales = scales.data;
  a.data_type = data.dtype;
  a.packed = true;
  a.format = format;
  a.n = n;
  return a;
}

}  // namespace fastllm
