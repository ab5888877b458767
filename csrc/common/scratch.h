// Memory that a thread keeps between kernel calls, so that no kernel allocates in a decode step.
#pragma once
#include <cstddef>

namespace fastllm {

enum class Scratch : int { rows, panels, sums, count };

// At least `bytes` bytes on a 64-byte boundary, this thread's own until its next call with that
// slot. Contents are undefined. The memory grows and is released when the thread ends.
void* thread_scratch(Scratch slot, size_t bytes);

}  // namespace fastllm
