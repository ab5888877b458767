// A CUDA block on one CPU thread: every CUDA thread is a fiber that runs until it meets a barrier
// or an operation of its whole warp. Shared memory starts as NaNs; every access to it and to device
// memory is checked against what was given. Asynchronous copies land either at once or only when
// they are waited for, and warps run in ascending or descending order: a kernel that lacks a wait
// or a barrier is wrong in one of the four.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define REQUIRE(condition, ...)                                            \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      std::abort();                                                        \
    }                                                                      \
  } while (0)

namespace emulated {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Copy {
  uint32_t to, bytes;
  const void* from;  // null: zeros
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::vector<char> stack;
  std::vector<std::vector<Copy>> commits;  // not landed yet
  std::vector<Copy> open;
  size_t landed = 0;
  Index thread;
  bool done = false;
};

// 32 lanes meet: each leaves its operands, the last one to come computes all results.
struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  uint32_t in[32][12];
  uint32_t out[32][4];
};

struct Options {
  bool lazy_copies = false, descending = false;
};

struct Device {
  std::vector<std::pair<const char*, const char*>> readable, writable;
  std::vector<char> shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Options options;
  Index block, grid;
  int current = 0, waiting = 0;
  unsigned barrier_generation = 0;
  void* scheduler = nullptr;
  std::function<void()> kernel;
  int64_t blocks_run = 0, products = 0;

  void allow(const void* data, size_t bytes, bool write) {
    const char* from = static_cast<const char*>(data);
    readable.emplace_back(from, from + bytes);
    if (write) writable.emplace_back(from, from + bytes);
  }
};
inline Device& device() {
  static Device the_device;
  return the_device;
}

inline bool inside(const std::vector<std::pair<const char*, const char*>>& ranges, const void* data,
                   size_t bytes) {
  const char* from = static_cast<const char*>(data);
  for (const auto& [begin, end] : ranges)
    if (from >= begin && from + bytes <= end) return true;
  return false;
}
inline void check_read(const void* data, size_t bytes) {
  REQUIRE(inside(device().readable, data, bytes), "read of %zu bytes outside the tensors", bytes);
  REQUIRE(reinterpret_cast<uintptr_t>(data) % bytes == 0, "misaligned read of %zu bytes", bytes);
}
inline void check_write(const void* data, size_t bytes) {
  REQUIRE(inside(device().writable, data, bytes), "write of %zu bytes outside outputs", bytes);
  REQUIRE(reinterpret_cast<uintptr_t>(data) % bytes == 0, "misaligned write of %zu bytes", bytes);
}
inline char* shared(uint32_t offset, size_t bytes) {
  REQUIRE(offset + bytes <= device().shared.size() && offset % bytes == 0,
          "%zu bytes at %u of %zu bytes of shared memory", bytes, offset, device().shared.size());
  return device().shared.data() + offset;
}

// Saves the callee-saved registers of the System V ABI and goes on at another stack.
extern "C" void emulated_switch(void** save, void* to);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
.section .note.GNU-stack,"",@progbits
.text
)");

inline Fiber& fiber() { return device().fibers[static_cast<size_t>(device().current)]; }
inline void yield() { emulated_switch(&fiber().stack_pointer, device().scheduler); }

inline void fiber_main() {
  device().kernel();
  fiber().done = true;
  yield();
  std::abort();  // a fiber that is done is never resumed
}

inline void barrier() {
  Device& d = device();
  const unsigned generation = d.barrier_generation;
  if (++d.waiting == static_cast<int>(d.fibers.size())) {
    d.waiting = 0;
    ++d.barrier_generation;
    return;
  }
  while (d.barrier_generation == generation) yield();
}

// `compute(warp)` runs once all 32 lanes have left `in`.
template <class Compute>
const uint32_t* with_warp(const uint32_t* in, size_t count, Compute compute) {
  Device& d = device();
  Warp& warp = d.warps[static_cast<size_t>(d.current / 32)];
  const int lane = d.current % 32;
  std::memcpy(warp.in[lane], in, count * 4);
  const unsigned generation = warp.generation;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
    compute(warp);
  } else {
    while (warp.generation == generation) yield();
  }
  return warp.out[lane];
}

inline void land(const Copy& copy) {
  char* to = shared(copy.to, copy.bytes);
  if (copy.from)
    std::memcpy(to, copy.from, copy.bytes);
  else
    std::memset(to, 0, copy.bytes);
}
inline void copy(uint32_t to, const void* from, uint32_t bytes, bool keep) {
  shared(to, bytes);
  REQUIRE(reinterpret_cast<uintptr_t>(from) % bytes == 0, "misaligned copy");
  if (keep) check_read(from, bytes);
  const Copy what{to, bytes, keep ? from : nullptr};
  if (!device().options.lazy_copies) land(what);
  fiber().open.push_back(what);
}
inline void commit() {
  fiber().commits.push_back(std::move(fiber().open));
  fiber().open.clear();
}
inline void wait(size_t pending) {
  Fiber& f = fiber();
  for (; f.landed + pending < f.commits.size(); ++f.landed) {
    if (device().options.lazy_copies)
      for (const Copy& copy : f.commits[f.landed]) land(copy);
    f.commits[f.landed].clear();
  }
}

// Runs a kernel over a grid, block after block.
inline void launch(Index grid, int threads, size_t shared_bytes, std::function<void()> kernel) {
  Device& d = device();
  d.grid = grid;
  d.kernel = std::move(kernel);
  constexpr size_t kStack = 64 << 10;
  d.fibers.resize(static_cast<size_t>(threads));
  d.warps.assign(static_cast<size_t>(threads / 32), Warp{});
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        d.block = {x, y, z};
        ++d.blocks_run;
        d.shared.assign(shared_bytes, static_cast<char>(0xff));  // NaN as bf16, fp16 and fp32
        for (int t = 0; t < threads; ++t) {
          Fiber& f = d.fibers[static_cast<size_t>(t)];
          f.stack.resize(kStack);
          f.commits.clear();
          f.open.clear();
          f.landed = 0;
          f.thread = {static_cast<unsigned>(t), 0, 0};
          f.done = false;
          // The stack as emulated_switch leaves it: six registers, then where to return to. At the
          // entry of a function the stack pointer is 8 past a multiple of 16.
          auto top = reinterpret_cast<uintptr_t>(f.stack.data() + kStack) / 16 * 16;
          auto* words = reinterpret_cast<void**>(top) - 8;
          for (int i = 0; i < 8; ++i) words[i] = nullptr;
          words[6] = reinterpret_cast<void*>(&fiber_main);
          f.stack_pointer = words;
        }
        for (int left = threads; left > 0;) {
          left = 0;
          for (int i = 0; i < threads; ++i) {
            const int t = d.options.descending ? threads - 1 - i : i;
            d.current = t;
            if (fiber().done) continue;
            emulated_switch(&d.scheduler, fiber().stack_pointer);
            left += !fiber().done;
          }
        }
        REQUIRE(d.waiting == 0, "a thread is left at a barrier");
        for (const Warp& w : d.warps) REQUIRE(w.arrived == 0, "a warp is incomplete");
        for (const Fiber& f : d.fibers)
          REQUIRE(f.open.empty() && f.landed == f.commits.size(), "a copy was not waited for");
      }
}

}  // namespace emulated

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulated::fiber().thread)
#define blockIdx (emulated::device().block)
#define gridDim (emulated::device().grid)

struct uint4 {
  uint32_t x, y, z, w;
};
struct int4 {
  int32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
