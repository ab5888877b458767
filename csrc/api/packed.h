// Checks of packed weights that several ops share.
#pragma once
#include <initializer_list>

#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

inline Format parse_format(int64_t code, const char* op) {
  check(code >= 0 && code < kFormats, op, "unknown format");
  return static_cast<Format>(code);
}
inline int64_t float_bytes(DType dtype) { return dtype == DType::bf16 ? 2 : 4; }

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.ndim != static_cast<int>(shape.size())) return false;
  int i = 0;
  for (int64_t size : shape)
    if (t.shape[i++] != size) return false;
  return true;
}

// data and scales hold n rows of k columns, `rows` of them interleaved.
inline void check_packed(const Tensor& data, const Tensor& scales, Format format, int64_t n,
                         int64_t k, const char* op, int64_t rows = 16) {
  check(n >= 0 && k >= 0, op, "n and k must not be negative");
  check(data.contiguous() && scales.contiguous(), op, "data and scales must be contiguous");
  const int64_t panels = (n + rows - 1) / rows;
  const FormatLayout layout = layout_of(format);
  if (is_dense(format)) {
    const bool bf16 = format == Format::bf16;
    check(data.dtype == layout.scales, op, "data has another dtype than its format");
    check(
        bf16 ? has_shape(data, {panels, (k + 1) / 2, rows, 2}) : has_shape(data, {panels, k, rows}),
        op, "data has another shape than its format needs");
    return;
  }
  check(k % layout.columns == 0, op, "k is no multiple of the columns that the format needs");
  check(data.dtype == DType::u8 && has_shape(data, {panels, k / 32, layout.words, rows, 4}), op,
        "data has another shape than its format needs");
  const int64_t groups = layout.group == 0 ? 1 : (k + layout.group - 1) / layout.group;
  check(scales.dtype == layout.scales &&
            (layout.record > 0   ? has_shape(scales, {panels, k / 256, layout.record * rows})
             : layout.record < 0 ? has_shape(scales, {panels, row_scale_bytes(format, k) * rows})
                                 : has_shape(scales, {panels, groups, layout.sides, rows})),
        op, "scales have another shape or dtype than the format needs");
}

// y [m, n] and bias [n] of a product; x [m, k]; scratch for prepared rows.
MatmulOutput matmul_output(const Tensor& y, const Tensor& bias, int64_t m, int64_t n,
                           const char* op);
void check_rows(const Tensor& x, const char* op);
void check_scratch(const Tensor& scratch, int64_t bytes, const char* op);
int64_t prepared_bytes(int64_t m, int64_t k);

}  // namespace fastllm
