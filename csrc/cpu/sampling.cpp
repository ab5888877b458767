// One token per row: penalties, temperature, truncation, Gumbel-max draw, log-probabilities.
//   1. tiles of 512 columns, shared among threads: (max, sum exp) of raw and of processed logits
//   2. rows with min_p, top_k or top_p: the threshold that survivors reach (one thread per row)
//   3. tiles again, for rows that draw: the best processed logit + noise
//   4. rows: the winner, its log-probabilities, its count
// Processed logits are made again from the raw ones wherever they are needed: a multiplication,
// against a [rows, columns] buffer. No result depends on which thread did a tile.
#include "common/scratch.h"
#include "cpu/philox.h"
#include "cpu/select.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr float kInf = __builtin_inff();
constexpr float kGreedyBelow = 1e-5f;
constexpr float kLargestNoise = 22.9f;  // -log(-log(1 - 2^-33)) = 22.87
constexpr int64_t kStats = 6;           // floats per tile

enum Stat { kRawMax, kRawSum, kMax, kSum, kBest, kBestId };

struct Row {
  const float* logits;
  float* stats;      // [tiles, kStats]
  float* threshold;  // of the survivors
  const int32_t* banned;
  int32_t* counts;  // null: no penalties
  const uint8_t* in_prompt;
  float repetition, presence, frequency, inverse_temperature;
  bool greedy, any_banned, plain;  // plain: processed logits are the raw ones
};

int64_t tiles_of(const SamplingArgs& a) { return (a.columns + kLseTile - 1) / kLseTile; }

Row row_of(const SamplingArgs& a, int64_t s) {
  Row row;
  row.logits = a.logits + s * a.stride;
  row.stats = a.scratch + s * (tiles_of(a) * kStats + 1);
  row.threshold = row.stats + tiles_of(a) * kStats;
  row.banned = a.banned + s * a.num_banned;
  const bool penalized = a.counts && a.penalized[s];
  row.counts = penalized ? a.counts + s * a.columns : nullptr;
  row.in_prompt = penalized ? a.in_prompt + s * a.columns : nullptr;
  row.repetition = a.repetition[s];
  row.presence = a.presence[s];
  row.frequency = a.frequency[s];
  row.greedy = a.temperature[s] < kGreedyBelow;
  row.inverse_temperature = row.greedy ? 1.f : 1.f / a.temperature[s];
  row.any_banned = false;
  for (int64_t i = 0; i < a.num_banned; ++i) row.any_banned |= row.banned[i] >= 0;
  row.plain = !penalized && !row.any_banned && row.inverse_temperature == 1.f;
  return row;
}

bool truncates(const SamplingArgs& a, int64_t s) {
  const bool top_k = a.top_k[s] > 0 && a.top_k[s] < a.columns;
  return !(a.temperature[s] < kGreedyBelow) && (top_k || a.top_p[s] < 1.f || a.min_p[s] > 0.f);
}

void penalize(const Row& row, int64_t begin, int64_t n, float* z) {
  const int32_t* counts = row.counts + begin;
  const uint8_t* in_prompt = row.in_prompt + begin;
  for (int64_t i = 0; i < n; ++i) {
    const bool generated = counts[i] > 0;
    float v = z[i];
    const float repeated = v > 0.f ? v / row.repetition : v * row.repetition;
    v = generated || in_prompt[i] ? repeated : v;
    const float less = (v - row.presence) - row.frequency * static_cast<float>(counts[i]);
    z[i] = generated ? less : v;
  }
}

// Processed logits of tile t, n of them (a multiple of VL, padded with -inf): in `copy`, or in
// place.
const float* processed_tile(const SamplingArgs& a, const Row& row, int64_t t, float* copy,
                            int64_t* n) {
  const float* x = padded_tile(row.logits, a.columns, t, copy, n);
  if (row.plain) return x;
  if (x != copy) __builtin_memcpy(copy, x, static_cast<size_t>(*n) * sizeof(float));
  const int64_t begin = t * kLseTile;
  const int64_t real = a.columns - begin < kLseTile ? a.columns - begin : kLseTile;
  for (int64_t i = 0; row.any_banned && i < a.num_banned; ++i) {
    const int64_t at = row.banned[i] - begin;
    if (at >= 0 && at < real) copy[at] = -kInf;
  }
  if (row.counts) penalize(row, begin, real, copy);
  if (row.inverse_temperature != 1.f)
    for (int64_t i = 0; i < real; ++i) copy[i] *= row.inverse_temperature;
  return copy;
}

void measure_tile(const SamplingArgs& a, const Row& row, int64_t t) {
  alignas(64) float copy[kLseTile];
  int64_t n;
  const float* raw = padded_tile(row.logits, a.columns, t, copy, &n);
  const TileLse raw_lse = tile_lse(raw, n);
  TileLse lse = raw_lse;
  if (!row.plain) {
    const float* z = processed_tile(a, row, t, copy, &n);
    lse = tile_lse(z, n);
  }
  float* stats = row.stats + t * kStats;
  stats[kRawMax] = raw_lse.max, stats[kRawSum] = raw_lse.sum;
  stats[kMax] = lse.max, stats[kSum] = lse.sum;
}

// All processed logits of the row that are >= low, in order.
int64_t survivors(const SamplingArgs& a, const Row& row, float low, float* list) {
  alignas(64) float copy[kLseTile];
  int64_t length = 0;
  for (int64_t t = 0; t < tiles_of(a); ++t) {
    if (row.stats[t * kStats + kMax] < low) continue;
    int64_t n;
    const float* z = processed_tile(a, row, t, copy, &n);
    length = append_above(list, length, z, n, low);
  }
  pad_list(list, length);
  return length;
}

// The smallest processed logit that survives min_p, top_k and top_p.
float find_threshold(const SamplingArgs& a, const Row& row, int64_t s) {
  const int64_t tiles = tiles_of(a);
  const RowLse lse = merge_tiles(row.stats + kMax, tiles, kStats);
  if (!is_valid(lse)) return -kInf;
  // Room for a full tile past the end: lists are written VL at a time.
  const size_t room = static_cast<size_t>(a.columns + kLseTile);
  float* list = static_cast<float*>(thread_scratch(Scratch::rows, 2 * room * sizeof(float)));
  float* weight = list + room;

  const float min_p = a.min_p[s] < 1.f ? a.min_p[s] : 1.f;
  const float top_p = a.top_p[s] > 0.f ? a.top_p[s] : 0.f;
  const int64_t k = a.top_k[s];
  const bool use_k = k > 0 && k < a.columns, use_p = a.top_p[s] < 1.f;
  float cut = a.min_p[s] > 0.f ? lse.max + log1(min_p) : -kInf;
  const bool alone = !use_k && cut == -kInf;  // top_p truncates the whole row
  float low = cut;
  if (use_k && k <= tiles) {
    // Each tile's maximum is a value, so the k-th largest of them bounds the k-th largest of all.
    for (int64_t t = 0; t < tiles; ++t) list[t] = row.stats[t * kStats + kMax];
    pad_list(list, tiles);
    low = vmax(vset(low), vset(kth_largest(list, tiles, k, -kInf, lse.max)))[0];
  } else if (use_p && alone) {
    // All values below this one together weigh less than half of what top_p may leave out.
    const float spare = 0.5f * (1.f - top_p) * lse.sum / static_cast<float>(a.columns);
    low = lse.max + (log1(spare) - 1e-3f);
  }
  const int64_t length = survivors(a, row, low, list);
  if (use_k) cut = vmax(vset(cut), vset(kth_largest(list, length, k, low, lse.max)))[0];
  if (!use_p) return cut;
  for (int64_t i = 0; i < length; i += VL) vstore(weight + i, vexp(vload(list + i) - lse.max));
  const double all = alone ? lse.sum : mass_above(list, weight, length, cut);
  const double wanted = static_cast<double>(top_p) * all;
  const float start = cut > low ? cut : low;
  return last_reached(start, lse.max,
                      [&](float x) { return mass_above(list, weight, length, x) >= wanted; });
}

struct Best {
  float score = -kInf;
  int32_t id = -1;
};

// The best noisy logit of a tile; values that cannot beat `rival` are passed over.
Best draw_tile(const SamplingArgs& a, const Row& row, const PhiloxRow& noise, int64_t t,
               float rival) {
  alignas(64) float copy[kLseTile];
  const float threshold = *row.threshold;
  int64_t n;
  Best best;
  if (row.stats[t * kStats + kMax] < threshold) return best;
  const float* tile = processed_tile(a, row, t, copy, &n);
  for (int64_t c = 0; c < n; c += VL) {
    const vf z = vload(tile + c);
    const vf target = vset(rival);
    const vi survives = z >= vset(threshold);
    if (!vany(survives & (z + kLargestNoise >= target))) continue;
    const int64_t first = t * kLseTile + c;
    const vi words = philox_words(noise, first);
    if (!vany(survives & (z + gumbel_bound(words) >= target))) continue;
    const vf score = z + gumbel_noise(words);
    for (int i = 0; i < VL; ++i)
      if (survives[i] && score[i] > best.score) best = {score[i], static_cast<int32_t>(first + i)};
    rival = best.score > rival ? best.score : rival;
  }
  return best;
}

void draw_tiles(const SamplingArgs& a, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(a);
  for (int64_t task = begin; task < end;) {
    const int64_t s = task / tiles;
    const int64_t stop = (s + 1) * tiles < end ? (s + 1) * tiles : end;
    const Row row = row_of(a, s);
    if (!row.greedy) {
      const PhiloxRow noise = philox_row(a.seed[s], a.position[s]);
      float rival = -kInf;
      for (int64_t t = task - s * tiles; t < stop - s * tiles; ++t) {
        const Best best = draw_tile(a, row, noise, t, rival);
        rival = best.score > rival ? best.score : rival;
        row.stats[t * kStats + kBest] = best.score;
        row.stats[t * kStats + kBestId] = __builtin_bit_cast(float, best.id);
      }
    }
    task = stop;
  }
}

int32_t winner(const SamplingArgs& a, const Row& row, float max) {
  Best best;
  for (int64_t t = 0; t < tiles_of(a); ++t) {
    const float* stats = row.stats + t * kStats;
    if (!row.greedy) {
      if (stats[kBest] > best.score)
        best = {stats[kBest], __builtin_bit_cast(int32_t, stats[kBestId])};
    } else if (stats[kMax] == max) {
      alignas(64) float copy[kLseTile];
      int64_t n, i = 0;
      const float* z = processed_tile(a, row, t, copy, &n);
      while (z[i] != max) ++i;
      return static_cast<int32_t>(t * kLseTile + i);
    }
  }
  return best.id;
}

void finish_row(const SamplingArgs& a, int64_t s) {
  const Row row = row_of(a, s);
  const int64_t tiles = tiles_of(a);
  const RowLse raw = merge_tiles(row.stats + kRawMax, tiles, kStats);
  const RowLse lse = row.plain ? raw : merge_tiles(row.stats + kMax, tiles, kStats);
  const int32_t id = is_valid(raw) && is_valid(lse) ? winner(a, row, lse.max) : -1;
  a.ids[s] = id;
  a.logprob[s] = a.logprob_t[s] = __builtin_nanf("");
  if (id < 0) return;
  alignas(64) float copy[kLseTile];
  int64_t n;
  const float* z = processed_tile(a, row, id / kLseTile, copy, &n);
  a.logprob[s] = log_prob(raw, row.logits[id]);
  a.logprob_t[s] = log_prob(lse, z[id % kLseTile]);
  if (row.counts) ++row.counts[id];
}

}  // namespace

void sampling(const SamplingArgs& a, const Team& team) {
  const int64_t tiles = tiles_of(a);
  int64_t begin, end, first, last;
  my_share(team, a.rows * tiles, 1, &begin, &end);
  my_share(team, a.rows, 1, &first, &last);
  for (int64_t task = begin; task < end;) {
    const int64_t s = task / tiles;
    const Row row = row_of(a, s);
    for (; task < end && task < (s + 1) * tiles; ++task) measure_tile(a, row, task - s * tiles);
  }
  team_sync(team);
  // Every thread reads the same parameters, so all agree on which barriers there are.
  bool any_draw = false;
  for (int64_t s = 0; s < a.rows; ++s) any_draw |= !(a.temperature[s] < kGreedyBelow);
  if (any_draw) {
    for (int64_t s; (s = next_task(team)) < a.rows;) {
      const Row row = row_of(a, s);
      *row.threshold = truncates(a, s) ? find_threshold(a, row, s) : -kInf;
    }
    team_sync(team);
    draw_tiles(a, begin, end);
    team_sync(team);
  }
  for (int64_t s = first; s < last; ++s) finish_row(a, s);
}

}  // namespace fastllm::FASTLLM_ISA
