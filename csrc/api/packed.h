// Checks of packed weights that several ops share.
#pragma once
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

inline Format parse_format(int64_t code, const char* op) {
  check(code >= 0 && code <= static_cast<int64_t>(Format::f32), op, "unknown format");
  return static_cast<Format>(code);
}
inline int64_t float_bytes(DType dtype) { return dtype == DType::bf16 ? 2 : 4; }
inline bool is_dense(Format f) { return f == Format::bf16 || f == Format::f32; }

// data and scales hold n rows of k columns in panels of 16 rows.
inline void check_packed(const Tensor& data, const Tensor& scales, Format format, int64_t n,
                         int64_t k, const char* op) {
  constexpr int64_t rows = 16;
  check(n >= 0 && k >= 0, op, "n and k must not be negative");
  check(data.contiguous() && scales.contiguous(), op, "data and scales must be contiguous");
  const int64_t groups = (n + rows - 1) / rows;
  if (is_dense(format)) {
    const bool bf16 = format == Format::bf16;
    check(data.dtype == (bf16 ? DType::bf16 : DType::f32), op,
          "data has another dtype than its format");
    check(bf16 ? data.ndim == 4 && data.shape[0] == groups && data.shape[1] == (k + 1) / 2 &&
                     data.shape[2] == rows && data.shape[3] == 2
               : data.ndim == 3 && data.shape[0] == groups && data.shape[1] == k &&
                     data.shape[2] == rows,
          op, "data has another shape than its format needs");
    return;
  }
  const int64_t words = format == Format::q8_0 ? 8 : 4, sides = format == Format::q4_1 ? 2 : 1;
  check(k % 32 == 0, op, "k must be a multiple of 32");
  check(data.dtype == DType::u8 && data.ndim == 5 && data.shape[0] == groups &&
            data.shape[1] == k / 32 && data.shape[2] == words && data.shape[3] == rows &&
            data.shape[4] == 4,
        op, "data has another shape than its format needs");
  check(scales.dtype == DType::f16 && scales.ndim == 4 && scales.shape[0] == groups &&
            scales.shape[1] == k / 32 && scales.shape[2] == sides && scales.shape[3] == rows,
        op, "scales have another shape than the format needs");
}

// y [m, n] and bias [n] of a product; x [m, k]; scratch for prepared rows.
MatmulOutput matmul_output(const Tensor& y, const Tensor& bias, int64_t m, int64_t n,
                           const char* op);
void check_rows(const Tensor& x, const char* op);
void check_scratch(const Tensor& scratch, int64_t bytes, const char* op);
int64_t prepared_bytes(int64_t m, int64_t k);

}  // namespace fastllm
