// What kernels know of the caches of this machine.
#pragma once

namespace fastllm {

// L1 holds 32 KB of data, not 48 and more. What goes by it was measured on Zen 4 and Zen 5 alone.
extern const bool l1_is_small;

}  // namespace fastllm
