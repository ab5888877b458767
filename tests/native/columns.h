// Experts' weights that lie transposed, as GPT-OSS has them.
#pragma once
#include "harness.h"

namespace fastllm::test {

// Where the value of output o and column c of expert e of a weight [experts, n, k] lies if the weight
// is stored in columns; paired: the first and the second half of the outputs in turns.
inline int64_t column_place(const Tensor& weight, bool paired, int64_t e, int64_t o, int64_t c) {
  const int64_t n = weight.shape[1], k = weight.shape[2], half = n / 2;
  const int64_t place = !paired ? o : o < half ? 2 * o : 2 * (o - half) + 1;
  return (e * k + c) * n + place;
}

// Memory for a weight [experts, n, k] in columns, seen as [experts, n, k].
inline Owned empty_columns(DType dtype, const Tensor& like) {
  Owned made(dtype, {like.shape[0], like.shape[1], like.shape[2]});
  made.view.stride[1] = 1;
  made.view.stride[2] = like.shape[1];
  return made;
}

// Calls body(place in rows, place in columns) for every value.
template <class Body>
void each_place(const Tensor& weight, bool paired, const Body& body) {
  int64_t row = 0;
  for (int64_t e = 0; e < weight.shape[0]; ++e)
    for (int64_t o = 0; o < weight.shape[1]; ++o)
      for (int64_t c = 0; c < weight.shape[2]; ++c)
        body(row++, column_place(weight, paired, e, o, c));
}

// A weight that lies in rows, in columns.
inline Owned to_columns(const Owned& rows, bool paired) {
  Owned made = empty_columns(rows.view.dtype, rows);
  each_place(rows, paired, [&](int64_t from, int64_t to) { made.set(to, rows.get(from)); });
  return made;
}

}  // namespace fastllm::test
