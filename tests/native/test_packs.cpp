// pack and unpack, quant_embedding and the input's gradient, of every format.
#include "packs.h"

namespace fastllm::test {
namespace {

struct FileBlock {
  Format format;
  int64_t columns, bytes;
};
constexpr FileBlock kFileBlocks[] = {
    {Format::q4_0, 32, 18},   {Format::q4_1, 32, 20},   {Format::q5_0, 32, 22},
    {Format::q5_1, 32, 24},   {Format::q8_0, 32, 34},   {Format::q4_k, 256, 144},
    {Format::q5_k, 256, 176}, {Format::q6_k, 256, 210},
};

void check_same(const Owned& a, const Owned& b) {
  CHECK(a.bytes == b.bytes && std::memcmp(a.view.data, b.view.data, a.bytes) == 0);
}

// Blocks of a file come back from panels, byte for byte.
void file_blocks() {
  Random random(40);
  for (const FileBlock& block : kFileBlocks)
    for (int64_t n : {1, 16, 21})
      for (int64_t columns : {32, 256, 288}) {
        const int64_t k = whole(block.format, columns), code = static_cast<int64_t>(block.format);
        Owned rows = random.bytes({n, k / block.columns * block.bytes});
        Packed packed = random_packed(random, block.format, n, k);
        run_everywhere("pack", &Kernels::pack,
                       pack_args(packed.data, packed.scales, rows, code, n, k),
                       {&packed.data, &packed.scales}, -1.f);
        Owned back(DType::u8, {n, k / block.columns * block.bytes});
        run_everywhere("unpack", &Kernels::unpack,
                       unpack_blocks_args(back, packed.data, packed.scales, code, n, k), {&back},
                       -1.f, [&] { check_same(back, rows); });
      }
}

// The same for rows that are packed one by one.
void single_rows(Random& random, Format format, int64_t n, int64_t k) {
  const int64_t code = static_cast<int64_t>(format);
  Packed packed = random_packed(random, format, n, k);
  Packed one = random_packed(random, format, n, k, 1);
  run_everywhere("unpack", &Kernels::unpack,
                 unpack_rows_args(one.data, one.scales, packed.data, packed.scales, code, n, k),
                 {&one.data, &one.scales}, -1.f);
  Packed again = random_packed(random, format, n, k);
  run_everywhere("pack", &Kernels::pack,
                 pack_rows_args(again.data, again.scales, one.data, one.scales, code, n, k),
                 {&again.data, &again.scales}, -1.f, [&] {
                   if (n % 16) return;  // padding is random where it came from, and zero now
                   check_same(again.data, packed.data);
                   check_same(again.scales, packed.scales);
                 });
}

// dy times the whole weight, which embedding reads out in the dtype of dy.
void input_gradients(Random& random, Packed& w) {
  const int64_t n = w.n, k = w.k, code = static_cast<int64_t>(w.format);
  Owned ids(DType::i32, {n});
  for (int64_t i = 0; i < n; ++i) ids.view.as<int32_t>()[i] = static_cast<int32_t>(i);
  for (DType dtype : {DType::f32, DType::bf16}) {
    Owned weight(dtype, {n, k});
    run_everywhere("embedding", &Kernels::embedding,
                   quant_embedding_args(weight, ids, w.data, w.scales, code, n), {&weight}, 0);
    if (is_dense(w.format)) continue;
    for (int64_t m : {1, 30}) {
      Owned dy = random.tensor(dtype, {m, n}), dx(DType::f32, {m, k});
      run_everywhere(
          "quant_matmul_input_grad", &Kernels::quant_matmul_input_grad,
          quant_matmul_input_grad_args(dx, dy, w.data, w.scales, code, {}), {&dx}, 1e-4f, [&] {
            for (int64_t i = 0; i < m * k; ++i) {
              double want = 0;
              for (int64_t c = 0; c < n; ++c)
                want += static_cast<double>(dy.get(i / k * n + c)) * weight.get(c * k + i % k);
              CHECK(std::fabs(dx.get(i) - want) <= 1e-4 * (1 + std::fabs(want)));
            }
          });
    }
  }
}

}  // namespace

void test_packs() {
  file_blocks();
  Random random(41);
  for (Format format : all_formats()) {
    for (int64_t n : {1, 16, 35}) single_rows(random, format, n, whole(format, 96));
    for (int64_t n : {1, 35}) {
      Packed w = random_packed(random, format, n, whole(format, 96));
      input_gradients(random, w);
    }
  }
}

}  // namespace fastllm::test
