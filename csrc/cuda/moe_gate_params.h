// What the router's kernel is given, and where its shared memory lies. Plain C++: the launcher fills
// it, the kernel and its CPU emulation read it.
#pragma once
#include <cstdint>

#include "common/tensor.h"

namespace fastllm::cuda {

constexpr int kGateWarps = 16;  // a warp takes a token
constexpr int kGateThreads = 32 * kGateWarps;
constexpr int kGateBlocks = 64;  // at most, all on the GPU at once: they wait for each other
constexpr int kGateMaxExperts = kGateThreads;  // a thread sorts the slots of one expert
constexpr int kGateMaxTokens = 8192;
constexpr int kGateMaxSlots = 32;   // k: a lane each
constexpr int kGateMaxGroups = 32;  // a lane each

// Byte offsets in shared memory: a row of 4-byte words for each warp, one of warps, the ids of the
// block's slots.
struct GateShared {
  int32_t warps_at, ids_at, bytes;
};

struct MoeGateParams {
  int32_t* ids;           // [tokens, k]
  float* weights;         // [tokens, k]
  int32_t* counts;        // [experts]
  float* score_sum;       // [experts]
  float* z_sum;           // one
  int32_t* offsets;       // [slice + 1], or null: nothing is sorted
  int32_t* slots;         // [tokens * k], or null
  int32_t* block_counts;  // [blocks, experts]: what blocks tell each other
  float* block_scores;    // [blocks, experts]
  float* block_z;         // [blocks]
  const float* logits;    // [tokens, experts], rows contiguous
  const float* bias;      // [experts], or null
  int64_t stride;
  int32_t tokens, experts, k, groups, kept_groups, group_size;
  int32_t chunk;                // tokens of a block
  int32_t first_expert, slice;  // whose slots are sorted
  float scale;
  bool sigmoid, by_logits, top2, renormalize;
  GateShared shared;
};

// A checked call: what the kernel takes, how many blocks, and how many logits a lane holds.
struct MoeGateCall {
  MoeGateParams p;
  int32_t blocks, values;
};

inline int32_t gate_blocks(int64_t tokens) {
  const int64_t wanted = (tokens + kGateWarps - 1) / kGateWarps;
  return static_cast<int32_t>(wanted < 1 ? 1 : wanted < kGateBlocks ? wanted : kGateBlocks);
}
// Floats that blocks tell each other.
inline int64_t gate_scratch(int64_t tokens, int64_t experts) {
  return gate_blocks(tokens) * (2 * experts + 1);
}

// Needs experts, k and chunk.
inline GateShared gate_shared(const MoeGateParams& p) {
  GateShared s;
  s.warps_at = kGateWarps * p.experts * 4;
  s.ids_at = (s.warps_at + kGateWarps * 4 + 15) / 16 * 16;
  s.bytes = s.ids_at + (p.chunk * p.k * 4 + 15) / 16 * 16;
  return s;
}

// None arrives as a Tensor that is not given. offsets and slots go together. Throws
// std::invalid_argument.
MoeGateCall moe_gate_call(Tensor weights, Tensor ids, Tensor counts, Tensor score_sum, Tensor z_sum,
                          Tensor offsets, Tensor slots, Tensor scratch, Tensor logits, Tensor bias,
                          bool sigmoid, int64_t groups, int64_t kept_groups, bool top2,
                          bool renormalize, double scale, int64_t first_expert);

// Queues the kernel on a CUDA stream of the current device. Throws std::runtime_error.
void moe_gate(const MoeGateCall& call, void* stream);

// body(integral constant): the number of logits a lane holds.
template <int kValues>
struct GateValues {
  static constexpr int value = kValues;
};
template <class Body>
void visit_gate(const MoeGateCall& call, Body body) {
  switch (call.values) {
    case 1: return body(GateValues<1>{});
    case 2: return body(GateValues<2>{});
    case 4: return body(GateValues<4>{});
    case 8: return body(GateValues<8>{});
    default: return body(GateValues<16>{});
  }
}

}  // namespace fastllm::cuda
