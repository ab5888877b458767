// The router: scores of a row of logits, the k experts of largest choice, their weights. A row is
// padded to whole vectors and stays in L1; choices are compared as integers that order like them.
// A chunk of rows adds up its statistics in its own place, and the chunks, which the number of
// tokens alone decides, are added in order after all are done. Bound by instructions: a row of 256
// takes one exponential and k + 4 passes of 16 vectors.
#include "common/scratch.h"
#include "cpu/moe_scores.h"
#include "cpu/top_k.h"
#include "ops_moe.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// The sums of a chunk of tokens, or of all.
struct Sums {
  float* scores;    // [experts]
  int32_t* counts;  // [experts]
  float* z;
};

Sums sums_of(const MoeGateArgs& a, int64_t chunks, int64_t chunk) {
  if (chunks <= 1) return {a.score_sum, a.counts, a.z_sum};
  float* at = a.partial + chunk * (2 * a.experts + 1);
  return {at, reinterpret_cast<int32_t*>(at + a.experts), at + 2 * a.experts};
}

struct Buffers {
  float *logits, *scores;      // [padded(experts)]
  int32_t *keys, *group_keys;  // [padded(experts) + VL]: lists are read a vector at a time
  double* sums;                // [experts]: of the scores of a chunk's tokens
};

Buffers buffers(int64_t experts) {
  const int64_t room = padded(experts) + VL;
  auto* at = static_cast<float*>(
      thread_scratch(Scratch::rows, static_cast<size_t>(6 * room) * sizeof(float)));
  return {at, at + room, reinterpret_cast<int32_t*>(at + 2 * room),
          reinterpret_cast<int32_t*>(at + 3 * room), reinterpret_cast<double*>(at + 4 * room)};
}

// The order of each choice, from logits or from scores (+ bias); false: one is NaN or +inf.
bool choice_keys(const float* x, const float* bias, int64_t n, int32_t* keys) {
  vi bad = vseti(0);
  for (int64_t c = 0; c < n; c += VL) {
    vf choice = vload(x + c);
    const int64_t live = smaller(n - c, VL);
    if (bias) choice += live == VL ? vload(bias + c) : load_n(bias + c, live);
    bad |= ~(choice < vset(__builtin_inff()));
    vi key = vorder(choice);
    if (live < VL) key = vlanes() < vseti(static_cast<int32_t>(live)) ? key : vseti(kRemoved);
    vstore_keys(keys + c, key);
  }
  return !vany(bad);
}

// Takes the experts outside the best groups off the list.
void keep_best_groups(const MoeGateArgs& a, int32_t* keys, int32_t* group_keys) {
  const int64_t size = a.experts / a.groups;
  const int64_t n = padded(a.groups);
  for (int64_t g = 0; g < n; ++g) {
    if (g >= a.groups) {
      group_keys[g] = kRemoved;
      continue;
    }
    const TwoKeys two = two_largest(keys + g * size, size);
    group_keys[g] =
        a.top2 ? vorder(vset(of_order(two.first) + of_order(two.second)))[0] : two.first;
  }
  for (int64_t kept = 0; kept < a.kept_groups; ++kept) take_largest(group_keys, n);
  for (int64_t g = 0; g < a.groups; ++g)
    if (group_keys[g] != kRemoved)
      for (int64_t i = 0; i < size; ++i) keys[g * size + i] = kRemoved;
}

// A row without a distribution; it adds nothing to the sums.
double no_choice(int32_t* ids, float* weights, int64_t k) {
  for (int64_t j = 0; j < k; ++j) ids[j] = -1, weights[j] = 0.f;
  return 0.0;
}

// The weights of the chosen from their scores, in double: one rounding each.
void weigh(const MoeGateArgs& a, const float* scores, const int32_t* ids, float* weights) {
  double sum = 0.0;
  for (int64_t j = 0; j < a.k; ++j) sum += scores[ids[j]];
  const double factor = a.renormalize ? a.scale / (sum + kScoreEps) : a.scale;
  for (int64_t j = 0; j < a.k; ++j) weights[j] = static_cast<float>(scores[ids[j]] * factor);
}

// One token; returns the square of its log-sum-exp.
double one_row(const MoeGateArgs& a, int64_t row, const Buffers& b, const Sums& sums) {
  int32_t* ids = a.ids + row * a.k;
  float* weights = a.weights + row * a.k;
  const int64_t n = padded(a.experts);
  const float* x = padded_row(a.logits + row * a.stride, a.experts, b.logits);
  const RowLse lse = exponentials(x, n, b.scores);
  if (!is_valid(lse)) return no_choice(ids, weights, a.k);
  float norm = 1.f;  // of the scores, as the statistics want them
  if (a.sigmoid)
    norm = sigmoids(x, n, b.scores) + kScoreEps;
  else
    divide_row(b.scores, n, lse.sum);
  const bool by_logits = !a.bias && (a.groups == 1 || !a.top2);
  if (!choice_keys(by_logits ? x : b.scores, a.bias, a.experts, b.keys))
    return no_choice(ids, weights, a.k);
  if (a.kept_groups < a.groups) keep_best_groups(a, b.keys, b.group_keys);
  for (int64_t j = 0; j < a.k; ++j) {
    ids[j] = take_largest(b.keys, n);
    ++sums.counts[ids[j]];
  }
  weigh(a, b.scores, ids, weights);
  const float inverse = 1.f / norm;
  for (int64_t e = 0; e < a.experts; ++e) b.sums[e] += b.scores[e] * inverse;
  const double z = lse_of(lse);
  return z * z;
}

void one_chunk(const MoeGateArgs& a, int64_t chunks, int64_t chunk) {
  const Sums sums = sums_of(a, chunks, chunk);
  const Buffers b = buffers(a.experts);
  __builtin_memset(b.sums, 0, static_cast<size_t>(a.experts) * sizeof(double));
  __builtin_memset(sums.counts, 0, static_cast<size_t>(a.experts) * sizeof(int32_t));
  double z = 0.0;
  const int64_t end = smaller((chunk + 1) * kGateChunk, a.tokens);
  for (int64_t row = chunk * kGateChunk; row < end; ++row) z += one_row(a, row, b, sums);
  *sums.z = static_cast<float>(z);
  for (int64_t e = 0; e < a.experts; ++e) sums.scores[e] = static_cast<float>(b.sums[e]);
}

// Sums of experts [begin, end) over the chunks, in double: one rounding for any number of tokens.
void add_chunks(const MoeGateArgs& a, int64_t chunks, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 16;
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t n = smaller(kColumns, end - first);
    double scores[kColumns] = {};
    int32_t counts[kColumns] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Sums sums = sums_of(a, chunks, chunk);
      for (int64_t i = 0; i < n; ++i) {
        scores[i] += sums.scores[first + i];
        counts[i] += sums.counts[first + i];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      a.score_sum[first + i] = static_cast<float>(scores[i]);
      a.counts[first + i] = counts[i];
    }
  }
}

void add_z(const MoeGateArgs& a, int64_t chunks) {
  double z = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) z += *sums_of(a, chunks, chunk).z;
  *a.z_sum = static_cast<float>(z);
}

}  // namespace

void moe_gate(const MoeGateArgs& a, const Team& team) {
  const int64_t chunks = divide_up(a.tokens, kGateChunk);
  if (chunks <= 1) {
    if (team.thread == 0) one_chunk(a, chunks, 0);
    return;
  }
  for (int64_t chunk = next_task(team); chunk < chunks; chunk = next_task(team))
    one_chunk(a, chunks, chunk);
  team_sync(team);
  int64_t begin, end;
  my_share(team, a.experts, 16, &begin, &end);
  add_chunks(a, chunks, begin, end);
  if (team.thread == team.size - 1) add_z(a, chunks);
}

}  // namespace fastllm::FASTLLM_ISA
