#include "api/packed.h"
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

PackArgs pack_args(Tensor data, Tensor scales, Tensor rows, int64_t format_code, int64_t n,
                   int64_t k) {
  const char* op = "pack";
  const Format format = parse_basic_format(format_code, op);
  check_packed(data, scales, format, n, k, op);
  check(rows.ndim == 2 && rows.shape[0] == n && rows_contiguous(rows), op,
        "rows must have n contiguous rows");
  if (is_dense(format)) {
    check(is_float(rows) || rows.dtype == DType::f16, op, "rows must be f32, bf16 or f16");
    check(rows.shape[1] == k, op, "rows must have k columns");
  } else {
    const int64_t size = format == Format::q8_0 ? 34 : format == Format::q4_1 ? 20 : 18;
    check(rows.dtype == DType::u8 && rows.shape[1] == k / 32 * size, op,
          "rows must be the blocks of the format");
  }
  return {.data = data.data,
          .scales = scales.as<uint16_t>(),
          .rows = rows.data,
          .rows_type = rows.dtype,
          .format = format,
          .n = n,
          .k = k,
          .row_stride = rows.stride[0]};
}

}  // namespace fastllm
