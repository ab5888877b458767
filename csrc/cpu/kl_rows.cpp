// Divergence of a row's distribution p from a teacher's q, and the gradient of p's logits:
//   forward  sum q (log q - log p)                        dz = p - q
//   reverse  sum p (log p - log q) = K                    dz = p (log p - log q - K)
//   js       b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p
//                                                         dz = (1 - b) p (log p - log m - KL(p||m))
// q comes from a row of logits, or as k log-probabilities; then all other ids are one outcome.
#include "common/scratch.h"
#include "cpu/softmax_rows.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr float kLeastLogRest = -16.635532f;  // log 2^-24: what fp32 can tell of 1 - sum q

struct Pair {  // log-probabilities of VL outcomes
  vf logp, logq;
};

struct Divergence {
  DivergenceKind kind;
  float beta;
  // Parts of a sum over outcomes: of the value, and K or KL(p || m) of the gradient.
  inline __attribute__((always_inline)) vf log_mixture(vf p, vf q) const {
    return vlog(beta * q + (1.f - beta) * p);
  }
  inline __attribute__((always_inline)) vf teacher_part(const Pair& o) const {
    const vf q = vexp(o.logq);
    if (kind == DivergenceKind::forward) return weighted(q, o.logq - o.logp);
    if (kind == DivergenceKind::reverse) return vset(0.f);
    return weighted(q, o.logq - log_mixture(vexp(o.logp), q));
  }
  inline __attribute__((always_inline)) vf student_part(const Pair& o) const {
    const vf p = vexp(o.logp);
    if (kind == DivergenceKind::forward) return vset(0.f);
    if (kind == DivergenceKind::reverse) return weighted(p, o.logp - o.logq);
    return weighted(p, o.logp - log_mixture(p, vexp(o.logq)));
  }
  inline __attribute__((always_inline)) float value(double teacher, double student) const {
    if (kind == DivergenceKind::js)
      return static_cast<float>(beta * teacher + (1. - beta) * student);
    return static_cast<float>(kind == DivergenceKind::forward ? teacher : student);
  }
  // mass: the sum of q; student: the sum of student_part.
  inline __attribute__((always_inline)) vf gradient(const Pair& o, float mass,
                                                    float student) const {
    const vf p = vexp(o.logp);
    if (kind == DivergenceKind::forward) return p * mass - vexp(o.logq);
    if (kind == DivergenceKind::reverse) return weighted(p, o.logp - o.logq - student);
    return (1.f - beta) * weighted(p, o.logp - log_mixture(p, vexp(o.logq)) - student);
  }
};

FASTLLM_INLINE vf log_probs_at(const float* z, int64_t live, const RowLse& r) {
  return (vload_part(z, live, -kInf) - r.max) - r.log_sum;
}

template <class D>
void dense_row(const KlRowsArgs& a, int64_t row, float* stats) {
  float *z = a.logits + row * a.stride, *t = a.teacher + row * a.teacher_stride;
  const int64_t n = a.columns;
  scale_row(z, n, a.scaling);
  scale_row(t, n, a.teacher_scaling);
  const RowLse lse = row_lse(z, n, stats), teacher_lse = row_lse(t, n, stats);
  const Divergence f{a.kind, a.beta};
  const auto at = [&](int64_t c, int64_t live) {
    return Pair{log_probs_at(z + c, live, lse), log_probs_at(t + c, live, teacher_lse)};
  };
  const double teacher =
      sum_columns(n, [&](int64_t c, int64_t k) { return f.teacher_part(at(c, k)); });
  const double student =
      sum_columns(n, [&](int64_t c, int64_t k) { return f.student_part(at(c, k)); });
  const bool valid = is_valid(lse) && is_valid(teacher_lse);
  if (a.out) {
    a.out[row] = valid ? f.value(teacher, student) : __builtin_nanf("");
    a.lse[row] = lse_of(lse);
  }
  if (!a.d) return;
  D* d = static_cast<D*>(a.d) + row * a.d_stride;
  const Slope slope(a.scaling);
  const float g = valid ? a.grad[row] : __builtin_nanf("");
  for (int64_t c = 0; c < n; c += VL) {
    const vf dz = f.gradient(at(c, n - c), 1.f, static_cast<float>(student));
    store_part(d + c, g * dz * slope.at(vload_part(z + c, n - c, 0.f)), n - c);
  }
}

int64_t id_of(const KlRowsArgs& a, int64_t row, int64_t i) {
  const int64_t at = row * a.picks + i;
  const int64_t id =
      a.long_ids ? static_cast<const int64_t*>(a.ids)[at] : static_cast<const int32_t*>(a.ids)[at];
  return clamped(id, 0, a.columns - 1);
}

// The k + 1 outcomes of a row.
struct Outcomes {
  float *logp, *logq, *saved;  // [picks + 1], [picks + 1], [picks]
  int64_t count;               // picks + 1, or picks if there is no other id
  float mass;                  // sum of q
  RowLse lse, rest;
};

Outcomes outcomes_of(const KlRowsArgs& a, int64_t row, float* z, float* stats, float* memory) {
  Outcomes o{memory, memory + a.picks + 1, memory + 2 * (a.picks + 1), a.picks, 0.f, {}, {}};
  o.lse = row_lse(z, a.columns, stats);
  double mass = 0.0;
  for (int64_t i = 0; i < a.picks; ++i) {
    const int64_t id = id_of(a, row, i);
    o.saved[i] = z[id];
    o.logp[i] = log_prob(o.lse, z[id]);
    o.logq[i] = a.logprobs[row * a.picks + i];
    mass += vexp(vset(o.logq[i]))[0];
  }
  for (int64_t i = 0; i < a.picks; ++i) z[id_of(a, row, i)] = -kInf;
  o.rest = row_lse(z, a.columns, stats);
  for (int64_t i = a.picks; i-- > 0;) z[id_of(a, row, i)] = o.saved[i];
  if (a.picks < a.columns) {
    const float left = mass < 1.0 ? static_cast<float>(1.0 - mass) : 0.f;
    const float log_left = log1(left);
    o.logp[a.picks] = log_prob(o.lse, o.rest.max) + o.rest.log_sum;
    o.logq[a.picks] = log_left > kLeastLogRest ? log_left : kLeastLogRest;
    mass += vexp(vset(o.logq[a.picks]))[0];
    o.count = a.picks + 1;
  }
  o.mass = static_cast<float>(mass);
  return o;
}

template <class D>
void top_row(const KlRowsArgs& a, int64_t row, float* stats, float* memory) {
  float* z = a.logits + row * a.stride;
  const int64_t n = a.columns;
  scale_row(z, n, a.scaling);
  const Outcomes o = outcomes_of(a, row, z, stats, memory);
  const Divergence f{a.kind, a.beta};
  const auto at = [&](int64_t i) { return Pair{vset(o.logp[i]), vset(o.logq[i])}; };
  double teacher = 0.0, student = 0.0;
  for (int64_t i = 0; i < o.count; ++i) {
    teacher += f.teacher_part(at(i))[0];
    student += f.student_part(at(i))[0];
  }
  const bool valid = is_valid(o.lse);
  if (a.out) {
    a.out[row] = valid ? f.value(teacher, student) : __builtin_nanf("");
    a.lse[row] = lse_of(o.lse);
  }
  if (!a.d) return;
  D* d = static_cast<D*>(a.d) + row * a.d_stride;
  const Slope slope(a.scaling);
  const float g = valid ? a.grad[row] : __builtin_nanf("");
  const auto gradient = [&](int64_t i) {
    return f.gradient(at(i), o.mass, static_cast<float>(student));
  };
  // Among the other ids the outcome's gradient is shared as p is.
  const vf spread = o.count > a.picks ? g * gradient(a.picks) : vset(0.f);
  const float log_rest = o.rest.max + o.rest.log_sum;
  for (int64_t c = 0; c < n; c += VL) {
    const vf x = vload_part(z + c, n - c, 0.f);
    store_part(d + c, weighted(vexp(x - log_rest), spread) * slope.at(x), n - c);
  }
  for (int64_t i = 0; i < a.picks; ++i) {
    const int64_t id = id_of(a, row, i);
    store1(d + id, (g * gradient(i) * slope.at(vset(z[id])))[0]);
  }
}

}  // namespace

void kl_rows(const KlRowsArgs& a, const Team& team) {
  const int64_t tiles = 2 * divide_up(a.columns, kLseTile), outcomes = 3 * (a.picks + 1);
  const size_t bytes = static_cast<size_t>(tiles + outcomes) * sizeof(float);
  float* stats = static_cast<float*>(thread_scratch(Scratch::rows, bytes));
  for (int64_t row; (row = next_task(team)) < a.rows;)
    dispatch_float(a.d_type, [&](auto t) {
      if (a.teacher)
        dense_row<decltype(t)>(a, row, stats);
      else
        top_row<decltype(t)>(a, row, stats, stats + tiles);
    });
}

}  // namespace fastllm::FASTLLM_ISA
