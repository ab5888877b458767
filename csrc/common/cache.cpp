#include "common/cache.h"

#include <unistd.h>

namespace fastllm {

#ifdef _SC_LEVEL1_DCACHE_SIZE
const bool l1_is_small = sysconf(_SC_LEVEL1_DCACHE_SIZE) == 32 * 1024;
#else
const bool l1_is_small = false;
#endif

}  // namespace fastllm
