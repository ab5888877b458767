// The sum of squares: chunks of a fixed size, each in its own order, then the chunks in order and in
// fp64, so that neither threads nor a tensor's size cost precision.
#include "cpu/integers.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class T>
float chunk_sum(const T* x, int64_t n) {
  constexpr int kChains = 4;  // the latency of an fma
  vf sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * VL <= n; i += kChains * VL) {
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      const vf v = load(x + i + j * VL);
      sums[j] = vfma(v, v, sums[j]);
    }
  }
  float total = vsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) {
    const float v = load1(x + i);
    total = sfma(v, v, total);
  }
  return total;
}

}  // namespace

void sum_of_squares(const SumOfSquaresArgs& a, const Team& team) {
  const int64_t chunks = divide_up(a.count, kSquaresChunk);
  int64_t begin, end;
  my_share(team, chunks, 1, &begin, &end);
  dispatch_float(a.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(a.x);
    for (int64_t i = begin; i < end; ++i)
      a.partial[i] =
          chunk_sum(x + i * kSquaresChunk, smaller(kSquaresChunk, a.count - i * kSquaresChunk));
  });
  team_sync(team);
  if (team.thread != 0) return;
  double total = 0;
  for (int64_t i = 0; i < chunks; ++i) total += static_cast<double>(a.partial[i]);
  *a.total = static_cast<float>(total);
}

}  // namespace fastllm::FASTLLM_ISA
