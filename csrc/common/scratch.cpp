#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace fastllm {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[static_cast<int>(Scratch::count)];

}  // namespace

void* thread_scratch(Scratch slot, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const size_t grown = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, grown);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = grown;
  }
  return buffer.data;
}

}  // namespace fastllm
