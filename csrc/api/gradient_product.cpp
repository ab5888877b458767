#include "common/check.h"
#include "ops_core.h"

namespace fastllm {
namespace {

// Of k in a step. A long k (of an input's gradient) is cut so that a block of b stays in the L2
// cache beside the rows that meet it; the k of a weight's gradient is one block, because y is large.
int64_t block_of(int64_t n, int64_t k, bool transposed) {
  if (transposed) return k < 1 ? 1 : k;
  return n <= 1024 ? 1024 : 512;
}
constexpr int64_t kPanel = 16;

}  // namespace

int64_t gradient_product_scratch(int64_t n, int64_t k, bool transposed) {
  const int64_t block = block_of(n, k, transposed);
  const int64_t panels = (n + kPanel - 1) / kPanel * kPanel * 4;
  return block < k ? 2 * panels * block : panels * k + 64;
}

GradientProductArgs gradient_product_args(Tensor y, Tensor a, Tensor b, Tensor scratch,
                                          bool transposed, bool add) {
  const char* op = "gradient_product";
  check(is_float(a) && a.ndim == 2 && rows_contiguous(a), op,
        "a must be f32 or bf16 with two dimensions, rows contiguous");
  const int64_t m = a.shape[transposed ? 1 : 0], k = a.shape[transposed ? 0 : 1];
  check(b.dtype == a.dtype && b.ndim == 2 && rows_contiguous(b) && b.shape[0] == k, op,
        "b must have the dtype and the k of a, rows contiguous");
  const int64_t n = b.shape[1], block = block_of(n, k, transposed);
  check(is_float(y) && y.ndim == 2 && rows_contiguous(y) && y.shape[0] == m && y.shape[1] == n, op,
        "y must be f32 or bf16 [m, n], rows contiguous");
  check(y.dtype == DType::f32 || (k <= block && !add), op,
        "sums over several blocks of k need y in f32");
  check(scratch.dtype == DType::u8 && scratch.contiguous() &&
            scratch.numel() >= gradient_product_scratch(n, k, transposed),
        op, "scratch is too small");
  return {.y = y.data,
          .a = a.data,
          .b = b.data,
          .scratch = scratch.data,
          .y_type = y.dtype,
          .type = a.dtype,
          .transposed = transposed,
          .add = add,
          .m = m,
          .n = n,
          .k = k,
          .k_block = block,
          .y_stride = y.stride[0],
          .a_stride = a.stride[0],
          .b_stride = b.stride[0]};
}

ColumnSumsArgs column_sums_args(Tensor y, Tensor x, bool add) {
  const char* op = "column_sums";
  check(is_float(x) && x.ndim == 2 && rows_contiguous(x), op,
        "x must be f32 or bf16 [rows, columns], rows contiguous");
  check(y.dtype == DType::f32 && y.ndim == 1 && y.contiguous() && y.shape[0] == x.shape[1], op,
        "y must be contiguous f32 [columns]");
  return {.y = y.as<float>(),
          .x = x.data,
          .type = x.dtype,
          .add = add,
          .rows = x.shape[0],
          .columns = x.shape[1],
          .stride = x.stride[0]};
}

}  // namespace fastllm
