// y[t, h] = weight[h] @ x[t, h] | tail[t, h]: products of one weight a head, as MLA absorbs its key
// map into queries and applies its value map. A task is a run of strips of one head: it packs each
// strip once and lets all rows meet it, with the tiles of linear, so that the bits are linear's.
#include "cpu/matmul_dense.h"
#include "cpu/pack_panel.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int64_t kTasksWanted = 4;  // a thread

template <int columns>
struct ElementOf {  // what a word holds: one of these, or two
  using type = uint32_t;
};
template <>
struct ElementOf<2> {
  using type = uint16_t;
};

template <class D>
struct HeadProduct : DenseRows<D> {
  using Element = typename ElementOf<D::columns>::type;
  const HeadLinearArgs& a;
  const Element* weight;
  uint32_t* panels;

  HeadProduct(const HeadLinearArgs& args, int64_t head)
      : DenseRows<D>{args.x + head * args.x_head_stride * static_cast<int64_t>(sizeof(Element)),
                     args.type, args.tokens, args.k, args.x_token_stride},
        a(args),
        weight(reinterpret_cast<const Element*>(args.weight) + head * args.weight_head_stride),
        panels(static_cast<uint32_t*>(thread_scratch(
            Scratch::panels, this->words() * kPanelRows * DenseRows<D>::strip * 4))) {}

  void begin_strip(int64_t panel, int64_t count) const {
    for (int64_t p = 0; p < count; ++p) {
      const int64_t row = (panel + p) * kPanelRows, left = a.n - row;
      const int64_t rows = left < kPanelRows ? left : kPanelRows;
      uint32_t* to = panels + p * this->words() * kPanelRows;
      if (a.transposed)
        pack_columns(weight + row, a.weight_stride, rows, a.k, to);
      else
        pack_panel(reinterpret_cast<const char*>(weight + row * a.weight_stride),
                   a.weight_stride * sizeof(Element), rows, a.k * sizeof(Element), this->words(),
                   to);
    }
  }
  template <int MR, int NP>
  void tile(int64_t, const char* x, int64_t width, bool, float* sums) const {
    dense_tile<D, MR, NP>(panels, this->words(), 0, reinterpret_cast<const uint32_t*>(x), width,
                          sums);
  }
};

// Strips [strip, end) of one head, for all tokens in blocks that stay in the L2 cache.
template <class D>
void run_strips(const HeadLinearArgs& a, int64_t head, int wide, int64_t strip, int64_t end,
                const Team& team) {
  using P = HeadProduct<D>;
  P p(a, head);
  const int64_t width = a.n + a.tail_dim, size = sizeof(typename P::Element);
  const int64_t most = kRowBlockBytes / (p.row_bytes() + 1) / P::rows * P::rows;
  const int64_t block = most < P::rows ? P::rows : most;
  for (int64_t row = 0; row < a.tokens; row += block) {
    p.m = a.tokens - row < block ? a.tokens - row : block;
    const MatmulOutput out{
        a.y + (row * a.heads + head) * width * size, nullptr, a.type, a.type, a.n, a.heads * width};
    const RowGroups x = prepare_rows(p, p.m, nullptr, team);
    strips_times_groups(p, out, x, wide, strip, end, 0, x.groups());
    p.x = static_cast<const char*>(p.x) + block * a.x_token_stride * size;
  }
}

template <class D>
void copy_tail(const HeadLinearArgs& a, int64_t head) {
  const int64_t size = sizeof(typename HeadProduct<D>::Element), width = a.n + a.tail_dim;
  for (int64_t t = 0; t < a.tokens; ++t)
    __builtin_memcpy(a.y + ((t * a.heads + head) * width + a.n) * size,
                     a.tail + (t * a.tail_token_stride + head * a.tail_head_stride) * size,
                     a.tail_dim * size);
}

template <class D>
void run(const HeadLinearArgs& a, const Team& team) {
  if (a.tokens == 0 || a.heads == 0) return;
  const int wide = a.tokens <= HeadProduct<D>::few ? 1 : HeadProduct<D>::strip;
  const int64_t strips = (a.n + wide * kPanelRows - 1) / (wide * kPanelRows);
  int64_t parts = (kTasksWanted * team.size + a.heads - 1) / a.heads;
  if (parts > strips) parts = strips;
  if (parts < 1) parts = 1;
  for (int64_t t; (t = next_task(team)) < a.heads * parts;) {
    const int64_t head = t / parts, part = t % parts;
    if (part == 0 && a.tail) copy_tail<D>(a, head);
    run_strips<D>(a, head, wide, strips * part / parts, strips * (part + 1) / parts, team);
  }
}

}  // namespace

void head_linear(const HeadLinearArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    run<Bf16Dense>(a, team);
  else
    run<Float32>(a, team);
}

}  // namespace fastllm::FASTLLM_ISA
