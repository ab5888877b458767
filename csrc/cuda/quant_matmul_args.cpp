// Checks of the low-batch product's arguments on the GPU.
#include "common/check.h"
#include "cuda/quant_matmul_params.h"

namespace fastllm::cuda {
namespace {

constexpr const char* kOp = "quant_matmul (CUDA)";

struct Kind {
  Codes codes;
  Scales scales;
  bool served;
};
Kind kind_of(Format format) {
  switch (format) {
    case Format::q4_0:
    case Format::int4_g32:
    case Format::int4_g64:
    case Format::int4_g128: return {Codes::nibble_offset, Scales::half, true};
    case Format::q4_1: return {Codes::nibble, Scales::half_min, true};
    case Format::int4_asym_g32:
    case Format::int4_asym_g64:
    case Format::int4_asym_g128: return {Codes::nibble, Scales::half_zero, true};
    case Format::q4_k: return {Codes::nibble, Scales::super_min, true};
    case Format::nf4: return {Codes::nf4, Scales::single, true};
    case Format::nf4_dq: return {Codes::nf4, Scales::nested, true};
    case Format::q8_0: return {Codes::int8, Scales::half, true};
    case Format::int8: return {Codes::int8, Scales::single, true};
    case Format::fp8:
    case Format::fp8_block: return {Codes::e4m3, Scales::single, true};
    default: return {Codes::int8, Scales::half, false};
  }
}

bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

void check_weight(const Tensor& data, const Tensor& scales, Format format, int64_t n, int64_t k) {
  const FormatLayout layout = layout_of(format);
  check(k % layout.columns == 0, kOp, "K does not fit the format");
  check(data.dtype == DType::u8 && data.ndim == 5 && data.contiguous() && data.shape[0] == n &&
            data.shape[1] == k / 32 && data.shape[2] == layout.words && data.shape[3] == 1 &&
            data.shape[4] == 4,
        kOp, "data must be contiguous u8 [N, K / 32, words, 1, 4]");
  const int64_t item = layout.scales == DType::u8 ? 1 : layout.scales == DType::f16 ? 2 : 4;
  check(scales.dtype == layout.scales && scales.contiguous() &&
            scales.numel() * item == n * row_scale_bytes(format, k),
        kOp, "scales must be contiguous, those of N rows with one row in a group");
  check(aligned(data.data, 16) && aligned(scales.data, 4), kOp,
        "data must lie on a 16-byte boundary, scales on 4 bytes");
}

}  // namespace

QuantMatmulCall quant_matmul_call(Tensor y, Tensor x, Tensor data, Tensor scales,
                                  int64_t format_code, Tensor bias, Tensor partials) {
  check(format_code >= 0 && format_code < kFormats, kOp, "unknown format");
  const Format format = static_cast<Format>(format_code);
  const Kind kind = kind_of(format);
  check(kind.served, kOp, "the format has no 4- or 8-bit codes");
  check(x.ndim == 2 && x.dtype == DType::bf16 && (x.shape[1] <= 1 || x.stride[1] == 1), kOp,
        "x must be bf16 [m, K] with contiguous rows");
  const int64_t m = x.shape[0], k = x.shape[1];
  check(m <= kProductTokens, kOp, "x must have at most 32 rows");
  check(aligned(x.data, 8) && (m <= 1 || x.stride[0] % 4 == 0), kOp,
        "rows of x must lie on 8-byte boundaries");
  check(y.ndim == 2 && y.contiguous() && y.shape[0] == m &&
            (y.dtype == DType::bf16 || y.dtype == DType::f32),
        kOp, "y must be contiguous bf16 or f32 [m, N]");
  const int64_t n = y.shape[1];
  check(n < (int64_t{1} << 31) && k < (int64_t{1} << 31), kOp, "the weight is too large");
  check_weight(data, scales, format, n, k);
  check(!bias.given() || (bias.ndim == 1 && bias.contiguous() && bias.shape[0] == n &&
                          (bias.dtype == DType::bf16 || bias.dtype == DType::f32)),
        kOp, "bias must be contiguous bf16 or f32 [N]");

  QuantMatmulCall call{};
  call.codes = kind.codes;
  call.token_tiles = m <= 8 ? 1 : m <= 16 ? 2 : 4;
  call.row_tiles = n >= kManyRows ? 2 : 1;
  const int64_t columns = kSegmentBytes / (4 * code_words(kind.codes)) * 32;
  const int64_t segments = (k + columns - 1) / columns;
  QuantMatmulParams& p = call.p;
  p.splits = product_splits(n, segments, 16 * call.row_tiles);
  p.segments_of_split = static_cast<int32_t>((segments + p.splits - 1) / p.splits);
  if (p.splits > 1) {
    check(partials.dtype == DType::f32 && partials.contiguous() &&
              partials.numel() >= p.splits * m * n,
          kOp, "partials must be f32 of splits x m x N");
    p.partials = partials.as<float>();
  }
  const int group = layout_of(format).group;
  p.blocks_of_group = group == 0 ? static_cast<int32_t>(k / 32 > 0 ? k / 32 : 1) : group / 32;
  p.chunk_mask = group == 0 || group >= 128 ? 3 : group / 32 - 1;
  p.data = data.as<uint8_t>();
  p.scales = scales.as<uint8_t>();
  p.x = x.as<uint16_t>();
  p.bias = bias.given() ? bias.data : nullptr;
  p.y = y.data;
  p.x_stride = x.stride[0];
  p.scale_bytes = row_scale_bytes(format, k);
  p.m = static_cast<int32_t>(m);
  p.n = static_cast<int32_t>(n);
  p.k = static_cast<int32_t>(k);
  p.kind = kind.scales;
  p.y_bf16 = y.dtype == DType::bf16;
  p.bias_bf16 = bias.given() && bias.dtype == DType::bf16;
  return call;
}

}  // namespace fastllm::cuda
