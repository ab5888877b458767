// What kernels know of the caches of this machine.
#pragma once

namespace fastllm {

extern const bool l1_is_small;  // L1 holds 32 KB of data, not 48 and more

}  // namespace fastllm
