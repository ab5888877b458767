// quantize and dequantize: every format, the same bits at every level, values near the weight's,
// rows that cannot be quantized.
#include <limits>

#include "harness.h"

namespace fastllm::test {
namespace {

struct Packed {
  Owned data, scales;
};
Packed empty_packed(Format format, int64_t n, int64_t k) {
  const FormatLayout l = layout_of(format);
  const int64_t panels = (n + 15) / 16, bytes = row_scale_bytes(format, k) * 16;
  Owned data(DType::u8, {panels, k / 32, l.words, 16, 4});
  if (l.record > 0) return {data, Owned(DType::u8, {panels, k / 256, l.record * 16})};
  if (l.record < 0) return {data, Owned(DType::u8, {panels, bytes})};
  const int64_t groups = l.group == 0 ? 1 : (k + l.group - 1) / l.group;
  return {data, Owned(l.scales, {panels, groups, l.sides, 16})};
}

// How far a value may be from its weight, in units of the largest of the row.
float step_of(Format format) {
  const int words = layout_of(format).words;
  if (format == Format::fp8 || format == Format::fp8_block) return 1.f / 16;
  if (format == Format::nf4 || format == Format::nf4_dq) return 0.16f;
  return 1.5f / static_cast<float>((1 << (words - 1)) - 1);
}

void every_format() {
  Random random(21);
  constexpr int64_t n = 19, k = 512;
  for (int code = 0; code < kFormats; ++code) {
    const Format format = static_cast<Format>(code);
    if (is_dense(format)) continue;
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (int weighted = 0; weighted < 3; ++weighted) {
        Owned w = random.tensor(dtype, {n, k}), bad(DType::i64, {2});
        for (int64_t c = 0; c < k; ++c) w.set(5 * k + c, 0.f);
        Owned importance =
            weighted == 2 ? random.tensor(DType::f32, {n, k}) : random.tensor(DType::f32, {k});
        for (int64_t i = 0; i < importance.view.numel(); ++i)
          importance.set(i, i % 64 < 32 ? 0.f : 1.1f + importance.get(i));
        Packed p = empty_packed(format, n, k);
        for (int64_t i = 0; i < 2; ++i) bad.view.as<int64_t>()[i] = n;
        const Tensor weights = weighted ? importance.view : Tensor{};
        const QuantizeArgs args = quantize_args(p.data, p.scales, bad, w, weights, code);
        std::vector<char> first;
        run_everywhere("quantize", &Kernels::quantize, args, {&p.data, &p.scales, &bad}, -1, [&] {
          std::vector<char> bits(p.data.view.as<char>(), p.data.view.as<char>() + p.data.bytes);
          bits.insert(bits.end(), p.scales.view.as<char>(),
                      p.scales.view.as<char>() + p.scales.bytes);
          if (first.empty()) first = bits;
          CHECK(bits == first);  // the same at every level
          CHECK(bad.view.as<int64_t>()[0] == n && bad.view.as<int64_t>()[1] == n);
        });
        Owned y(dtype, {n, k});
        // The largest of a group is clipped where it counts little.
        const float bound = (weighted ? 2.f : 1.f) * step_of(format);
        run_everywhere("dequantize", &Kernels::dequantize,
                       dequantize_args(y, p.data, p.scales, code), {&y}, 0, [&] {
                         for (int64_t i = 0; i < n * k; ++i)
                           if (!weighted || i % 64 >= 32)  // the others count nothing
                             CHECK(std::fabs(y.get(i) - w.get(i)) <= bound);
                         for (int64_t c = 0; c < k; ++c) CHECK(y.get(5 * k + c) == 0.f);
                       });
      }
  }
}

void bad_rows() {
  Random random(22);
  constexpr int64_t n = 40, k = 256;
  for (int code : {0, 2, 7, 9, 10, 13, 16, 17, 20}) {
    const Format format = static_cast<Format>(code);
    const DType type = layout_of(format).scales;
    const bool halves = type == DType::f16 || layout_of(format).record > 0;
    Owned w = random.tensor(DType::f32, {n, k}), bad(DType::i64, {2});
    w.set(33 * k + 7, std::numeric_limits<float>::quiet_NaN());
    w.set(21 * k + 255, -std::numeric_limits<float>::infinity());
    w.set(9 * k + 3, 3e38f);
    w.set(38 * k + 3, 1e9f);
    Packed p = empty_packed(format, n, k);
    for (int64_t i = 0; i < 2; ++i) bad.view.as<int64_t>()[i] = n;
    run_everywhere("quantize", &Kernels::quantize,
                   quantize_args(p.data, p.scales, bad, w, {}, code), {&bad}, -1, [&] {
                     CHECK(bad.view.as<int64_t>()[0] == 21);
                     CHECK(bad.view.as<int64_t>()[1] == (halves ? 9 : n));
                   });
  }
}

}  // namespace

void test_quantize() {
  every_format();
  bad_rows();
}

}  // namespace fastllm::test
