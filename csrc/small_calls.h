// Which calls are too small to wake a team for. A fork of two threads costs 1.4 us while they spin,
// and a time slice where another process has taken their core; a row of a decode step is done in
// less. Bits do not depend on the number of threads.
#pragma once
#include "ops_core.h"

namespace fastllm {

constexpr int64_t kFewCopied = 8192;  // elements of a norm or a rotation: 1.5 us on a Zen 5 core
constexpr int64_t kFewGated = 4096;   // of an activation with its exponential: 1.3 us

template <class Args>
bool runs_alone(const Args&) {
  return false;
}
inline bool runs_alone(const RmsNormArgs& a) { return a.outer * a.inner * a.n <= kFewCopied; }
inline bool runs_alone(const RmsNormBackwardArgs& a) {
  return a.outer * a.inner * a.n <= kFewCopied;
}
inline bool runs_alone(const RopeArgs& a) { return a.tokens * a.heads * a.dim <= kFewCopied; }
inline bool runs_alone(const SwigluArgs& a) { return a.outer * a.inner * a.n <= kFewGated; }
inline bool runs_alone(const SwigluBackwardArgs& a) { return a.outer * a.inner * a.n <= kFewGated; }

}  // namespace fastllm
