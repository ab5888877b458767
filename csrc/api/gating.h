// The code of a gated activation, checked.
#pragma once
#include "common/check.h"
#include "ops_core.h"

namespace fastllm {

inline Gating parse_gating(int64_t code, const char* op) {
  check(code >= 0 && code <= static_cast<int64_t>(Gating::swiglu_oai), op, "unknown activation");
  return static_cast<Gating>(code);
}

}  // namespace fastllm
