#include "api/packed.h"
#include "common/check.h"
#include "ops_quant.h"

namespace fastllm {

MatmulOutput matmul_output(const Tensor& y, const Tensor& bias, int64_t m, int64_t n,
                           const char* op) {
  check(is_float(y) && y.contiguous() && y.ndim == 2 && y.shape[0] == m && y.shape[1] == n, op,
        "y must be f32 or bf16, contiguous, [m, n]");
  if (bias.given())
    check(is_float(bias) && bias.contiguous() && bias.ndim == 1 && bias.shape[0] == n, op,
          "bias must be f32 or bf16, contiguous, [n]");
  return {.y = y.data,
          .bias = bias.given() ? bias.data : nullptr,
          .y_type = y.dtype,
          .bias_type = bias.dtype,
          .n = n,
          .y_stride = n};
}

void check_rows(const Tensor& x, const char* op) {
  check(is_float(x) && x.ndim == 2 && rows_contiguous(x), op,
        "x must be f32 or bf16 [m, k], rows contiguous");
}

void check_scratch(const Tensor& scratch, int64_t bytes, const char* op) {
  if (!scratch.given()) return;
  check(scratch.dtype == DType::u8 && scratch.contiguous() && scratch.numel() >= bytes, op,
        "scratch is too small");
  check(reinterpret_cast<uintptr_t>(scratch.data) % 64 == 0, op,
        "scratch must lie on a 64-byte boundary");
}

// Prepared rows come in groups of up to 12 and need at most 4 bytes a column and 8 a block of 32.
int64_t prepared_bytes(int64_t m, int64_t k) { return (m + 12) * (4 * k + k / 32 * 8 + 64); }

namespace {

// The checks of all products; y, which they differ in, is [m, columns].
QuantMatmulArgs product_args(const Tensor& y, int64_t columns, const Tensor& x, const Tensor& data,
                             const Tensor& scales, int64_t format_code, int64_t n,
                             const Tensor& bias, int64_t activation, const Tensor& scratch,
                             const char* op) {
  const Format format = parse_format(format_code, op);
  check_rows(x, op);
  check_packed(data, scales, format, n, x.shape[1], op);
  check_scratch(scratch, prepared_bytes(x.shape[0], x.shape[1]), op);
  check(activation >= 0 && activation <= 3, op, "unknown activation mode");
  const Activation mode = static_cast<Activation>(activation);
  const bool fp8 = format == Format::fp8 || format == Format::fp8_block;
  check(is_dense(format) || mode != (fp8 ? Activation::int8 : Activation::fp8), op,
        "the format has no such activation mode");
  const DType needed = is_dense(format)           ? data.dtype
                       : mode == Activation::bf16 ? DType::bf16
                       : mode == Activation::fp32 ? DType::f32
                                                  : x.dtype;
  check(x.dtype == needed, op, "x has another dtype than format and activation need");
  MatmulOutput out = matmul_output(y, Tensor{}, x.shape[0], columns, op);
  if (bias.given()) {
    check(is_float(bias) && bias.contiguous() && bias.ndim == 1 && bias.shape[0] == n, op,
          "bias must be f32 or bf16, contiguous, [n]");
    out.bias = bias.data;
    out.bias_type = bias.dtype;
  }
  out.n = n;
  return {.out = out,
          .x = x.data,
          .data = data.data,
          .scales = scales.data,
          .scratch = scratch.given() ? scratch.data : nullptr,
          .x_type = x.dtype,
          .format = format,
          .activation = mode,
          .m = x.shape[0],
          .k = x.shape[1],
          .x_stride = x.stride[0]};
}

Gating gating_of(int64_t code, const char* op) {
  check(
      code == static_cast<int64_t>(Gating::silu) || code == static_cast<int64_t>(Gating::gelu_tanh),
      op, "the gated activation must be silu or gelu_tanh");
  return static_cast<Gating>(code);
}

void check_residual(const Tensor& residual, int64_t m, int64_t n, const char* op) {
  check(!residual.given() ||
            (residual.dtype == DType::f32 && residual.contiguous() && has_shape(residual, {m, n})),
        op, "residual must be f32, contiguous, [m, n]");
}

}  // namespace

QuantMatmulArgs quant_matmul_args(Tensor y, Tensor x, Tensor data, Tensor scales,
                                  int64_t format_code, int64_t n, Tensor bias, int64_t activation,
                                  Tensor scratch) {
  return product_args(y, n, x, data, scales, format_code, n, bias, activation, scratch,
                      "quant_matmul");
}

FinishedProductArgs finished_product_args(Tensor y, Tensor x, Tensor data, Tensor scales,
                                          int64_t format_code, int64_t n, Tensor bias,
                                          int64_t activation, Tensor scratch, Tensor residual,
                                          int64_t gating) {
  const char* op = "finished_product";
  check(!is_dense(parse_format(format_code, op)), op, "the format must be a quantized one");
  const bool gated = !residual.given();
  const int64_t columns = gated ? n / 2 : n;
  const QuantMatmulArgs product =
      product_args(y, columns, x, data, scales, format_code, n, bias, activation, scratch, op);
  const Gating act = gating_of(gating, op);
  check(!gated || n % 32 == 0, op, "gate and up must have multiples of 16 rows");
  check(y.dtype == (gated ? x.dtype : DType::f32), op,
        "y must be in the dtype of x if gated, else f32");
  check_residual(residual, x.shape[0], n, op);
  return {.product = product, .residual = residual.as<float>(), .gating = act};
}

FinishProductArgs finish_product_args(Tensor y, Tensor product, Tensor residual, int64_t gating) {
  const char* op = "finish_product";
  check(is_float(product) && product.contiguous() && product.ndim == 2, op,
        "product must be f32 or bf16, contiguous, [m, n]");
  const bool gated = !residual.given();
  const int64_t m = product.shape[0], n = product.shape[1], columns = gated ? n / 2 : n;
  check(!gated || n % 2 == 0, op, "product must hold as many columns of up as of gate");
  check_residual(residual, m, n, op);
  check(y.dtype == (gated ? product.dtype : DType::f32) && y.contiguous() &&
            has_shape(y, {m, columns}),
        op, "y must be contiguous, [m, n] in f32, or [m, n / 2] in the dtype of product if gated");
  return {.y = y.data,
          .product = product.data,
          .residual = gated ? nullptr : residual.as<float>(),
          .type = product.dtype,
          .gating = gating_of(gating, op),
          .m = m,
          .columns = columns};
}

}  // namespace fastllm
