// A native call is a kernel and a copy of its arguments: what eager mode runs at once and a graph
// records.
#pragma once
#include <cstddef>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "common/team.h"

namespace fastllm {

class Call {
 public:
  template <class Args>
  Call(const char* name, Kernel<Args>* kernel, const Args& args) : name_(name) {
    static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= kArgsBytes);
    std::memcpy(args_, &args, sizeof(Args));
    kernel_ = reinterpret_cast<void (*)()>(kernel);
    enter_ = [](const Call& call, const Team& team) {
      (*reinterpret_cast<Kernel<Args>*>(call.kernel_))(*reinterpret_cast<const Args*>(call.args_),
                                                       team);
    };
  }
  void run(const Team& team) const { enter_(*this, team); }
  const char* name() const { return name_; }

 private:
  static constexpr size_t kArgsBytes = 384;
  const char* name_;
  void (*kernel_)();
  void (*enter_)(const Call&, const Team&);
  alignas(16) unsigned char args_[kArgsBytes];
};

// Runs the calls in order inside ONE parallel region with a barrier between two calls.
void run_calls(const Call* calls, size_t count, TaskCounter* counters);
void run_call(const Call& call);
void run_alone(const Call& call);  // on the calling thread, without a parallel region

}  // namespace fastllm
