// Gradients of RMSNorm, of its residual sum and of its weight. Two passes over rows that stay in
// cache: the row's sums, then dx. A chunk of rows adds its dweight up in its own row of `partial`;
// the chunks, which the shape alone decides, are added in order after all are done.
#include "common/scratch.h"
#include "cpu/integers.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct RowSums {
  float squares, products;  // of x; of dy * weight * x
};

template <class DY, class X, class W>
RowSums row_sums(const DY* dy, const X* x, const W* weight, int64_t n) {
  vf squares = vset(0.f), products = vset(0.f);
  int64_t c = 0;
  for (; c + VL <= n; c += VL) {
    const vf v = load(x + c);
    squares = vfma(v, v, squares);
    products = vfma(load(dy + c) * load(weight + c), v, products);
  }
  RowSums sums{vsum(squares), vsum(products)};
  for (; c < n; ++c) {
    const float v = load1(x + c);
    sums.squares = sfma(v, v, sums.squares);
    sums.products = sfma(load1(dy + c) * load1(weight + c), v, sums.products);
  }
  return sums;
}

// Where the gradients of one row go; null: not wanted.
template <class DX>
struct RowTargets {
  DX* dx;
  float *dresidual, *dweight;
};

// V is vf for whole vectors and float for the tail; `at` reads, `put` writes one of them.
template <class V, class At, class Put, class DX, class DY, class X, class W>
FASTLLM_INLINE void row_step(const RowTargets<DX>& to, const DY* dy, const X* x, const W* weight,
                             const float* dh, V rstd, V mean, int64_t c, At at, Put put) {
  const V g = at(dy + c), n = at(x + c) * rstd;
  V dx = rstd * (g * at(weight + c) - n * mean);
  if (to.dweight) put(to.dweight + c, at(to.dweight + c) + g * n);
  if (dh) dx = dx + at(dh + c);
  if (to.dx) put(to.dx + c, dx);
  if (to.dresidual) put(to.dresidual + c, dx);
}

template <class DX, class DY, class X, class W>
void row_gradients(const RowTargets<DX>& to, const DY* dy, const X* x, const W* weight,
                   const float* dh, float rstd, float mean, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL)
    row_step(
        to, dy, x, weight, dh, vset(rstd), vset(mean), c, [](auto* p) { return load(p); },
        [](auto* p, vf v) { store(p, v); });
  for (; c < n; ++c)
    row_step(
        to, dy, x, weight, dh, rstd, mean, c, [](auto* p) { return load1(p); },
        [](auto* p, float v) { store1(p, v); });
}

// Sums of many rows are made of sums of this many: as good as a tree's.
constexpr int64_t kBlock = 16;

// Rows [begin, end); what they give to dweight is added to `sums`, if given.
template <class DX, class DY, class X, class W>
void some_rows(const RmsNormBackwardArgs& a, float* sums, int64_t begin, int64_t end) {
  const W* weight = static_cast<const W*>(a.weight);
  const float columns = static_cast<float>(a.n);
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row / a.inner * a.x_outer_stride +
                 row % a.inner * a.x_inner_stride;
    const DY* dy = static_cast<const DY*>(a.dy) + row * a.n;
    const RowSums found = row_sums(dy, x, weight, a.n);
    const float rstd = 1.f / __builtin_sqrtf(found.squares / columns + a.eps);
    const RowTargets<DX> to{a.dx ? static_cast<DX*>(a.dx) + row * a.n : nullptr,
                            a.dresidual ? a.dresidual + row * a.n : nullptr, sums};
    row_gradients(to, dy, x, weight, a.dh ? a.dh + row * a.n : nullptr, rstd,
                  found.products * rstd / columns, a.n);
  }
}

FASTLLM_INLINE void clear(float* row, int64_t n) {
  __builtin_memset(row, 0, static_cast<size_t>(n) * sizeof(float));
}

template <class DX, class DY, class X, class W>
void one_chunk(const RmsNormBackwardArgs& a, int64_t chunk) {
  const int64_t rows = a.outer * a.inner, per_chunk = rms_norm_chunk_rows(a.n);
  const int64_t begin = chunk * per_chunk, end = smaller(begin + per_chunk, rows);
  if (!a.dweight) return some_rows<DX, DY, X, W>(a, nullptr, begin, end);
  float* sums = a.partial + chunk * a.n;
  clear(sums, a.n);
  some_rows<DX, DY, X, W>(a, sums, begin, smaller(begin + kBlock, end));
  auto* block =
      static_cast<float*>(thread_scratch(Scratch::rows, static_cast<size_t>(a.n) * sizeof(float)));
  for (int64_t row = begin + kBlock; row < end; row += kBlock) {
    clear(block, a.n);
    some_rows<DX, DY, X, W>(a, block, row, smaller(row + kBlock, end));
    for (int64_t c = 0; c < a.n; ++c) sums[c] += block[c];
  }
}

// Columns [begin, end) of dweight: the chunks' sums, added in order, blocks of them first.
template <class DW>
void add_chunks(const RmsNormBackwardArgs& a, int64_t chunks, int64_t begin, int64_t end) {
  DW* dweight = static_cast<DW*>(a.dweight);
  const auto sum = [&](int64_t c, auto zero, auto at) {
    auto total = zero;
    for (int64_t first = 0; first < chunks; first += kBlock) {
      auto block = zero;
      for (int64_t i = first; i < smaller(first + kBlock, chunks); ++i)
        block = block + at(a.partial + i * a.n + c);
      total = total + block;
    }
    return total;
  };
  int64_t c = begin;
  for (; c + VL <= end; c += VL)
    store(dweight + c, sum(c, vset(0.f), [](const float* p) { return vload(p); }));
  for (; c < end; ++c) store1(dweight + c, sum(c, 0.f, [](const float* p) { return *p; }));
}

template <class DX, class DY, class X, class W>
void my_chunks(const RmsNormBackwardArgs& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) one_chunk<DX, DY, X, W>(a, chunk);
}

}  // namespace

void rms_norm_backward(const RmsNormBackwardArgs& a, const Team& team) {
  const int64_t chunks = divide_up(a.outer * a.inner, rms_norm_chunk_rows(a.n));
  int64_t begin, end;
  my_share(team, chunks, 1, &begin, &end);
  dispatch_float(a.dx_type, [&](auto dx) {
    dispatch_float(a.dy_type, [&](auto dy) {
      dispatch_float(a.x_type, [&](auto x) {
        dispatch_float(a.weight_type, [&](auto weight) {
          my_chunks<decltype(dx), decltype(dy), decltype(x), decltype(weight)>(a, begin, end);
        });
      });
    });
  });
  if (!a.dweight) return;
  if (chunks > 1) {
    team_sync(team);
    my_share(team, a.n, 64, &begin, &end);
  } else {  // a few rows: whoever had them goes on alone
    if (chunks ? begin == end : team.thread != 0) return;
    begin = 0, end = a.n;
  }
  dispatch_float(a.dweight_type,
                 [&](auto dweight) { add_chunks<decltype(dweight)>(a, chunks, begin, end); });
}

}  // namespace fastllm::FASTLLM_ISA
