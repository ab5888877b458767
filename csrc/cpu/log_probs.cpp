// Log-softmax at chosen ids, and the k most likely ids, without writing a [rows, columns] result.
// Tiles of all rows are shared among the threads, then rows are.
#include "common/scratch.h"
#include "cpu/select.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

int64_t tiles_of(int64_t columns) { return (columns + kLseTile - 1) / kLseTile; }

// (max, sum) of every tile into stats [rows, tiles, 2].
void all_tiles(const float* logits, int64_t rows, int64_t columns, int64_t stride, float* stats,
               const Team& team) {
  const int64_t tiles = tiles_of(columns);
  int64_t begin, end;
  my_share(team, rows * tiles, 1, &begin, &end);
  float copy[kLseTile];
  for (int64_t task = begin; task < end; ++task) {
    int64_t n;
    const float* x = padded_tile(logits + task / tiles * stride, columns, task % tiles, copy, &n);
    const TileLse lse = tile_lse(x, n);
    stats[2 * task] = lse.max;
    stats[2 * task + 1] = lse.sum;
  }
}

struct Entry {
  float value;
  int32_t id;
};

// Stable merge sort, descending: equal values keep their ascending ids.
void sort_descending(Entry* entries, Entry* spare, int64_t n) {
  for (int64_t width = 1; width < n; width *= 2) {
    for (int64_t begin = 0; begin < n; begin += 2 * width) {
      const int64_t middle = begin + width < n ? begin + width : n;
      const int64_t end = begin + 2 * width < n ? begin + 2 * width : n;
      int64_t left = begin, right = middle;
      for (int64_t i = begin; i < end; ++i) {
        const bool take_left =
            left < middle && (right >= end || !(entries[right].value > entries[left].value));
        spare[i] = entries[take_left ? left++ : right++];
      }
    }
    for (int64_t i = 0; i < n; ++i) entries[i] = spare[i];
  }
}

// Values above the threshold all belong to the top k; of those equal to it the first ids do.
int64_t collect_top(const float* x, int64_t columns, int64_t k, float threshold, Entry* entries) {
  int64_t above = 0, found = 0;
  for (int64_t c = 0; c < columns; ++c) above += x[c] > threshold;
  int64_t ties = k - above;
  for (int64_t c = 0; c < columns && found < k; ++c) {
    if (x[c] > threshold || (x[c] == threshold && ties-- > 0))
      entries[found++] = {x[c], static_cast<int32_t>(c)};
  }
  return found;
}

// Where the k-th largest of the row is at least: that of the tiles' maxima, each of which is a
// value.
float floor_of_top(const float* stats, int64_t tiles, int64_t k, float max, float* list) {
  if (k > tiles) return -__builtin_inff();
  for (int64_t t = 0; t < tiles; ++t) list[t] = stats[2 * t];
  pad_list(list, tiles);
  return kth_largest(list, tiles, k, -__builtin_inff(), max);
}

void top_row(const TopLogProbsArgs& a, int64_t row) {
  const int64_t tiles = tiles_of(a.columns);
  const float* x = a.logits + row * a.stride;
  const float* stats = a.scratch + row * tiles * 2;
  float* values = a.values + row * a.k;
  int32_t* ids = a.ids + row * a.k;
  const RowLse lse = merge_tiles(stats, tiles, 2);
  if (!is_valid(lse)) {
    for (int64_t i = 0; i < a.k; ++i) values[i] = __builtin_nanf(""), ids[i] = -1;
    return;
  }
  const size_t list_bytes = static_cast<size_t>(a.columns + kLseTile + VL) * sizeof(float);
  const size_t entry_bytes = static_cast<size_t>(a.k) * sizeof(Entry);
  char* memory = static_cast<char*>(thread_scratch(Scratch::rows, list_bytes + 2 * entry_bytes));
  Entry* entries = reinterpret_cast<Entry*>(memory);
  float* list = reinterpret_cast<float*>(memory + 2 * entry_bytes);
  const float low = floor_of_top(stats, tiles, a.k, lse.max, list);
  int64_t length = 0;
  float copy[kLseTile];
  for (int64_t t = 0; t < tiles; ++t) {
    if (stats[2 * t] < low) continue;
    int64_t n;
    const float* tile = padded_tile(x, a.columns, t, copy, &n);
    length = append_above(list, length, tile, n, low);
  }
  pad_list(list, length);
  const float threshold = kth_largest(list, length, a.k, low, lse.max);
  const int64_t found = collect_top(x, a.columns, a.k, threshold, entries);
  sort_descending(entries, entries + a.k, found);
  for (int64_t i = 0; i < found; ++i) {
    values[i] = log_prob(lse, entries[i].value);
    ids[i] = entries[i].id;
  }
}

}  // namespace

void log_probs(const LogProbsArgs& a, const Team& team) {
  all_tiles(a.logits, a.rows, a.columns, a.stride, a.scratch, team);
  team_sync(team);
  const int64_t tiles = tiles_of(a.columns);
  int64_t begin, end;
  my_share(team, a.rows, 1, &begin, &end);
  for (int64_t row = begin; row < end; ++row) {
    const RowLse lse = merge_tiles(a.scratch + row * tiles * 2, tiles, 2);
    for (int64_t j = 0; j < a.picks; ++j) {
      const int64_t i = row * a.picks + j;
      const int64_t id = a.long_ids ? static_cast<const int64_t*>(a.ids)[i]
                                    : static_cast<const int32_t*>(a.ids)[i];
      const bool good = id >= 0 && id < a.columns && is_valid(lse);
      a.out[i] = good ? log_prob(lse, a.logits[row * a.stride + id]) : __builtin_nanf("");
    }
  }
}

void top_log_probs(const TopLogProbsArgs& a, const Team& team) {
  if (a.k == 0) return;
  all_tiles(a.logits, a.rows, a.columns, a.stride, a.scratch, team);
  team_sync(team);
  for (int64_t row; (row = next_task(team)) < a.rows;) top_row(a, row);
}

}  // namespace fastllm::FASTLLM_ISA
