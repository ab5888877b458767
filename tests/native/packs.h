// Random weights packed in any format, scales so small that values are about 0.1.
#pragma once
#include "common/formats.h"
#include "harness.h"

namespace fastllm::test {

struct Packed {
  Owned data, scales;
  Format format;
  int64_t n, k;  // of one expert
};

// The fewest columns that are at least k and that the format can hold.
inline int64_t whole(Format format, int64_t k) {
  const int64_t columns = layout_of(format).columns;
  return (k + columns - 1) / columns * columns;
}

inline float scale_size(Format format) {
  switch (format) {
    case Format::q8_0:
    case Format::int8:
    case Format::fp8:
    case Format::fp8_block: return 0.002f;
    case Format::q4_k:
    case Format::q5_k: return 0.0005f;
    case Format::q6_k: return 0.0001f;
    case Format::nf4: return 0.2f;
    case Format::nf4_dq: return 0.002f;
    default: return 0.02f;
  }
}

// Records of mixed types: `heads` halves or floats first, then bytes.
inline void fill_records(Random& random, Owned& scales, int64_t record, int64_t heads, bool floats,
                         uint8_t mask, float size) {
  auto* bytes = scales.view.as<uint8_t>();
  for (size_t at = 0; at < scales.bytes; at += static_cast<size_t>(record)) {
    for (int64_t i = 0; i < record; ++i) bytes[at + i] = random.bits() & mask;
    for (int64_t i = 0; i < heads; ++i) {
      const float value = size * random.value();
      const auto half = static_cast<_Float16>(value);
      if (floats)
        std::memcpy(bytes + at + 4 * i, &value, 4);
      else
        std::memcpy(bytes + at + 2 * i, &half, 2);
    }
  }
}

// [experts, ...] packs of n rows of k columns, r of them interleaved.
inline Packed random_experts(Random& random, Format format, int64_t experts, int64_t n, int64_t k,
                             int64_t r = 16) {
  const int64_t groups = (n + r - 1) / r;
  if (format == Format::bf16)
    return {random.tensor(DType::bf16, {experts, groups, (k + 1) / 2, r, 2}, 0.3f),
            Owned(DType::f16, {experts, 0}), format, n, k};
  if (format == Format::f32)
    return {random.tensor(DType::f32, {experts, groups, k, r}, 0.3f),
            Owned(DType::f16, {experts, 0}), format, n, k};
  const FormatLayout layout = layout_of(format);
  const float size = scale_size(format);
  Owned data = random.bytes({experts, groups, k / 32, layout.words, r, 4});
  if (format == Format::fp8 || format == Format::fp8_block)
    for (size_t i = 0; i < data.bytes; ++i)
      if (auto& byte = data.view.as<uint8_t>()[i]; (byte & 127) == 127) --byte;  // no NaN
  if (layout.record > 0) {
    const bool pairs = layout.record == 20;
    Owned scales(DType::u8, {experts, groups, k / 256, layout.record * r});
    fill_records(random, scales, layout.record * r, (pairs ? 2 : 1) * r, false, pairs ? 63 : 255,
                 size);
    return {data, scales, format, n, k};
  }
  if (layout.record < 0) {
    const int64_t record = row_scale_bytes(format, k) * r;
    Owned scales(DType::u8, {experts, groups, record});
    fill_records(random, scales, record, r, true, 255, size);
    return {data, scales, format, n, k};
  }
  const int64_t counts = layout.group ? (k + layout.group - 1) / layout.group : 1;
  Owned scales = random.tensor(layout.scales, {experts, groups, counts, layout.sides, r}, size);
  const bool zeros = format == Format::int4_asym_g32 || format == Format::int4_asym_g64 ||
                     format == Format::int4_asym_g128;
  for (int64_t i = 0; zeros && i < scales.view.numel(); ++i)
    if (i / r % 2) scales.set(i, static_cast<float>(random.bits() % 16));
  return {data, scales, format, n, k};
}

// The same tensor without its first dimension, of size 1.
inline void drop_first(Owned& t) {
  for (int i = 1; i < t.view.ndim; ++i)
    t.view.shape[i - 1] = t.view.shape[i], t.view.stride[i - 1] = t.view.stride[i];
  t.view.ndim -= 1;
}
inline Packed random_packed(Random& random, Format format, int64_t n, int64_t k, int64_t r = 16) {
  Packed packed = random_experts(random, format, 1, n, k, r);
  drop_first(packed.data);
  drop_first(packed.scales);
  return packed;
}

inline std::vector<Format> all_formats() {
  std::vector<Format> formats;
  for (int i = 0; i < kFormats; ++i) formats.push_back(static_cast<Format>(i));
  return formats;
}

}  // namespace fastllm::test
