// How a row's scales repeat, for those who move them without knowing what they mean.
#pragma once
#include "common/formats.h"
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// `count` elements of `element` bytes, then single bytes; a row holds one such record or several.
// Panels interleave rows element by element.
struct ScaleParts {
  int64_t element, count, bytes;
  int64_t size() const { return element * count + bytes; }
};
FASTLLM_INLINE ScaleParts scale_parts(Format format, int64_t k) {
  const FormatLayout l = layout_of(format);
  if (l.record > 0) return {2, (l.record - 16) / 2, 16};
  const int64_t bytes = row_scale_bytes(format, k);
  if (l.record < 0) return {4, 1, bytes - 4};
  const int64_t element = l.scales == DType::f16 ? 2 : 4;
  return {element, bytes / element, 0};
}

// Words of 4 bytes of a row's codes or values.
FASTLLM_INLINE int64_t row_words(Format format, int64_t k) {
  if (format == Format::bf16) return (k + 1) / 2;
  return format == Format::f32 ? k : row_code_bytes(format, k) / 4;
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
