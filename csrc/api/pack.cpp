#include "api/packed.h"
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {
namespace {

// Columns and bytes of a block of a GGUF file; none for formats that such files do not have.
struct FileBlock {
  int64_t columns, bytes;
};
FileBlock file_block(Format f) {
  switch (f) {
    case Format::q4_0: return {32, 18};
    case Format::q4_1: return {32, 20};
    case Format::q5_0: return {32, 22};
    case Format::q5_1: return {32, 24};
    case Format::q8_0: return {32, 34};
    case Format::q4_k: return {256, 144};
    case Format::q5_k: return {256, 176};
    case Format::q6_k: return {256, 210};
    default: return {0, 0};
  }
}

void check_blocks(const Tensor& rows, Format format, int64_t k, const char* op) {
  const FileBlock block = file_block(format);
  check(block.bytes > 0, op, "GGUF files have no blocks of the format");
  check(rows.dtype == DType::u8 && rows.shape[1] == k / block.columns * block.bytes, op,
        "rows must be the blocks of the format");
}

}  // namespace

PackArgs pack_args(Tensor data, Tensor scales, Tensor rows, int64_t format_code, int64_t n,
                   int64_t k) {
  const char* op = "pack";
  const Format format = parse_format(format_code, op);
  check_packed(data, scales, format, n, k, op);
  check(rows.ndim == 2 && rows.shape[0] == n && rows_contiguous(rows), op,
        "rows must have n contiguous rows");
  if (is_dense(format)) {
    check(is_float(rows) || rows.dtype == DType::f16, op, "rows must be f32, bf16 or f16");
    check(rows.shape[1] == k, op, "rows must have k columns");
  } else {
    check_blocks(rows, format, k, op);
  }
  return {.data = data.data,
          .scales = scales.data,
          .rows = rows.data,
          .row_scales = nullptr,
          .rows_type = rows.dtype,
          .format = format,
          .by_rows = false,
          .n = n,
          .k = k,
          .row_stride = rows.stride[0]};
}

PackArgs pack_rows_args(Tensor data, Tensor scales, Tensor row_data, Tensor row_scales,
                        int64_t format_code, int64_t n, int64_t k) {
  const char* op = "pack_rows";
  const Format format = parse_format(format_code, op);
  check_packed(data, scales, format, n, k, op);
  check_packed(row_data, row_scales, format, n, k, op, 1);
  return {.data = data.data,
          .scales = scales.data,
          .rows = row_data.data,
          .row_scales = row_scales.data,
          .rows_type = row_data.dtype,
          .format = format,
          .by_rows = true,
          .n = n,
          .k = k,
          .row_stride = 0};
}

UnpackArgs unpack_rows_args(Tensor row_data, Tensor row_scales, Tensor data, Tensor scales,
                            int64_t format_code, int64_t n, int64_t k) {
  const char* op = "unpack_rows";
  const Format format = parse_format(format_code, op);
  check_packed(data, scales, format, n, k, op);
  check_packed(row_data, row_scales, format, n, k, op, 1);
  return {.rows = row_data.data,
          .row_scales = row_scales.data,
          .data = data.data,
          .scales = scales.data,
          .format = format,
          .by_rows = true,
          .n = n,
          .k = k};
}

UnpackArgs unpack_blocks_args(Tensor rows, Tensor data, Tensor scales, int64_t format_code,
                              int64_t n, int64_t k) {
  const char* op = "unpack_blocks";
  const Format format = parse_format(format_code, op);
  check_packed(data, scales, format, n, k, op);
  check(rows.ndim == 2 && rows.shape[0] == n && rows.contiguous(), op,
        "rows must be contiguous and have n rows");
  check_blocks(rows, format, k, op);
  return {.rows = rows.data,
          .row_scales = nullptr,
          .data = data.data,
          .scales = scales.data,
          .format = format,
          .by_rows = false,
          .n = n,
          .k = k};
}

}  // namespace fastllm
