// The gradients of a mixture of experts (see fastllm/ops/moe_backward.py) in two lists of tasks.
// First blocks of experts' rows: dy through `down` and the activation to dpre, and on to dx of each
// slot, while dpre lies in the cache. Then, for every expert, ranges of the rows of both weights'
// gradients and the sums of biases; at last the sums of dx over the slots of tokens, small tasks
// that fill the end.
#include "cpu/moe_rows.h"
#include "cpu/weight_grad.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D>
struct DenseExperts {
  const MoeBackwardArgs& a;

  // Panels of the columns of a weight [k, n], where they are strips of rows, or lie in rows
  // themselves. Of strips the next one is asked for meanwhile, a line of every row: no stream that
  // hardware would follow (256 experts of 64 rows, Zen 4, two threads: 54 ms, not 61).
  void strip(const char* weight, int64_t expert_bytes, int64_t stride, bool columns, int64_t k,
             int64_t n, int64_t expert, int64_t panel, int count, uint32_t* to) const {
    const auto* w = reinterpret_cast<const Element<D>*>(weight + expert * expert_bytes);
    const int64_t column = panel * kPanelRows, words = words_of<D>(k);
    if (!columns) {
      const int64_t width = count * kPanelRows, per_line = 64 / static_cast<int64_t>(sizeof(*w));
      const int64_t next = column + width < n ? width : 0;
      const auto row = [&](int64_t c) __attribute__((always_inline)) {
        const Element<D>* at = w + c * stride + column;
        for (int64_t i = 0; i < next; i += per_line) __builtin_prefetch(at + next + i, 0, 2);
        return at;
      };
      return pack_row_strip<D>(row, n - column, count, k, to);
    }
    const int64_t size = sizeof(Element<D>);
    for (int64_t p = 0; p < count; ++p, to += words * kPanelRows) {
      const int64_t first = column + p * kPanelRows;
      pack_panel(reinterpret_cast<const char*>(w + first * stride), stride * size,
                 smaller(n - first, kPanelRows), k * size, words, to);
    }
  }
  void down(int64_t expert, int64_t panel, int count, uint32_t* to) const {
    strip(a.down, a.down_expert, a.down_stride, a.down_columns, a.rows.hidden, a.rows.inner, expert,
          panel, count, to);
  }
  void gate_up(int64_t expert, int64_t panel, int count, uint32_t* to) const {
    strip(a.gate_up, a.gate_up_expert, a.gate_up_stride, a.gate_up_columns, 2 * a.rows.inner,
          a.rows.hidden, expert, panel, count, to);
  }
};

template <class D>
struct MoeBackward {
  using T = Element<D>;
  const MoeBackwardArgs& a;
  const MoeRows& r;
  const Team& team;
  DenseExperts<D> weights{a};
  RowsBackward<D, DenseExperts<D>> rows{r, weights, team};

  MoeBackward(const MoeBackwardArgs& args, const Team& t) : a(args), r(args.rows), team(t) {}

  // The tasks of an expert, in their order.
  struct Counts {
    int64_t gate_up, down, gate_up_bias, down_bias;
    int64_t all() const { return gate_up + down + gate_up_bias + down_bias; }
  };
  Counts counts(int64_t expert) const {
    const int64_t mine = rows.rows_of(expert).size();
    return {a.dgate_up ? weight_grad_tasks(gate_up_rows(), mine, r.rows, team) : 0,
            a.ddown ? weight_grad_tasks(down_rows(), mine, r.rows, team) : 0,
            a.dgate_up_bias ? 1 : 0, a.ddown_bias ? 1 : 0};
  }
  // The rows of an expert's gradients, as they lie.
  int64_t gate_up_rows() const { return a.gate_up_columns ? r.hidden : 2 * r.inner; }
  int64_t down_rows() const { return a.down_columns ? r.inner : r.hidden; }

  template <class Y>
  void gate_up_grad(Y* y, int64_t expert, Span out) const {
    const Span mine = rows.rows_of(expert);
    const auto* x = static_cast<const T*>(a.x);
    const int64_t m = 2 * r.inner, n = a.gate_up_columns ? m : r.hidden;
    const bool streamed = streams_gradient(y, n, r.experts * m * r.hidden);
    y += expert * m * r.hidden;
    const auto pre = [&](int64_t i) -> const T* { return rows.dpre + (mine.begin + i) * m; };
    const auto row = [&](int64_t i) -> const T* {
      return x + rows.token_of(mine.begin + i) * a.x_stride;
    };
    if (a.gate_up_columns)
      weight_grad<D>(y, r.hidden, m, out, mine.size(), row, pre, streamed);
    else
      weight_grad<D>(y, m, r.hidden, out, mine.size(), pre, row, streamed);
  }
  template <class Y>
  void down_grad(Y* y, int64_t expert, Span out) const {
    const Span mine = rows.rows_of(expert);
    const int64_t n = a.down_columns ? r.hidden : r.inner;
    const bool streamed = streams_gradient(y, n, r.experts * r.hidden * r.inner);
    y += expert * r.hidden * r.inner;
    const auto row = [&](int64_t i) -> const T* {
      return rows.dy + rows.token_of(mine.begin + i) * r.dy_stride;
    };
    const auto weighted = [&](int64_t i) -> const T* {
      return rows.weighted + (mine.begin + i) * r.inner;
    };
    if (a.down_columns)
      weight_grad<D>(y, r.inner, r.hidden, out, mine.size(), weighted, row, streamed);
    else
      weight_grad<D>(y, r.hidden, r.inner, out, mine.size(), row, weighted, streamed);
  }

  // The sum of w * row over an expert's rows; the product is rounded first. Chains of 32 rows are
  // added up in ascending order, as in fp32 products.
  template <class Row, class Weight>
  void bias_grad(float* y, int64_t n, Span mine, const Row& row, const Weight& weight) const {
    constexpr int64_t chain = 32;
    __builtin_memset(y, 0, static_cast<size_t>(n) * sizeof(float));
    for (int64_t first = mine.begin; first < mine.end; first += chain) {
      const T* from[chain];
      float w[chain];
      const int64_t count = smaller(chain, mine.end - first);
      for (int64_t i = 0; i < count; ++i) from[i] = row(first + i), w[i] = weight(first + i);
      int64_t c = 0;
      for (; c + VL <= n; c += VL) {
        vf sum = vf{};
        for (int64_t i = 0; i < count; ++i) sum = sum + w[i] * load(from[i] + c);
        vstore(y + c, vload(y + c) + sum);
      }
      for (; c < n; ++c) {
        float sum = 0.f;
        for (int64_t i = 0; i < count; ++i) sum += w[i] * load1(from[i] + c);
        y[c] += sum;
      }
    }
  }

  void run_task(int64_t expert, int64_t index) const {
    const Counts n = counts(expert);
    const Span mine = rows.rows_of(expert);
    if (index < n.gate_up) {
      const Span out = weight_grad_rows(gate_up_rows(), n.gate_up, index);
      if (a.dgate_up_type == DType::bf16)
        return gate_up_grad(reinterpret_cast<uint16_t*>(a.dgate_up), expert, out);
      return gate_up_grad(reinterpret_cast<float*>(a.dgate_up), expert, out);
    }
    index -= n.gate_up;
    if (index < n.down) {
      const Span out = weight_grad_rows(down_rows(), n.down, index);
      if (a.ddown_type == DType::bf16)
        return down_grad(reinterpret_cast<uint16_t*>(a.ddown), expert, out);
      return down_grad(reinterpret_cast<float*>(a.ddown), expert, out);
    }
    const int64_t m = 2 * r.inner;
    if (index - n.down < n.gate_up_bias)
      return bias_grad(
          a.dgate_up_bias + expert * m, m, mine, [&](int64_t i) { return rows.dpre + i * m; },
          [](int64_t) { return 1.f; });
    bias_grad(
        a.ddown_bias + expert * r.hidden, r.hidden, mine,
        [&](int64_t i) { return rows.dy + rows.token_of(i) * r.dy_stride; },
        [&](int64_t i) { return rows.slot_of(i) < 0 ? 0.f : r.w[rows.slot_of(i)]; });
  }

  void run() const {
    rows.run();
    ExpertTasks list{r.experts};
    const auto count = [&](int64_t e) { return counts(e).all(); };
    for (;;) {
      const int64_t task = next_task(team, 1);
      if (list.find(task, count)) {
        run_task(list.expert, task - list.first);
        continue;
      }
      if (task - list.first >= rows.token_tasks()) return;
      rows.sum_tokens(task - list.first);
    }
  }
};

}  // namespace

void moe_backward(const MoeBackwardArgs& a, const Team& team) {
  if (a.rows.type == DType::bf16)
    MoeBackward<Bf16Dense>(a, team).run();
  else
    MoeBackward<Float32>(a, team).run();
}

}  // namespace fastllm::FASTLLM_ISA
