// A small harness: checks that stop the program, tensors that own exactly their bytes, and a runner
// that puts a kernel through every ISA level and several team sizes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "common/call.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ops.h"

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (0)

namespace fastllm::test {

inline size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    default: return 1;
  }
}

// A contiguous tensor whose allocation ends with its last byte: AddressSanitizer sees any step past
// it.
struct Owned {
  Tensor view;
  std::shared_ptr<void> memory;
  size_t bytes = 0;

  Owned(DType dtype, std::initializer_list<int64_t> shape) {
    view.dtype = dtype;
    view.ndim = static_cast<int>(shape.size());
    int i = 0;
    for (int64_t n : shape) view.shape[i++] = n;
    int64_t stride = 1;
    for (i = view.ndim - 1; i >= 0; --i) view.stride[i] = stride, stride *= view.shape[i];
    bytes = static_cast<size_t>(view.numel()) * size_of(dtype);
    // 64-byte starts, as torch gives; the size itself is not rounded up.
    void* data = nullptr;
    CHECK(posix_memalign(&data, 64, bytes ? bytes : 1) == 0);
    std::memset(data, 0, bytes);
    memory.reset(data, std::free);
    view.data = data;
  }
  operator Tensor() const { return view; }
  float get(int64_t i) const {
    if (view.dtype == DType::f32) return view.as<float>()[i];
    if (view.dtype == DType::f16) return static_cast<float>(view.as<_Float16>()[i]);
    CHECK(view.dtype == DType::bf16);
    const uint32_t bits = static_cast<uint32_t>(view.as<uint16_t>()[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  void set(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (view.dtype == DType::f32)
      view.as<float>()[i] = value;
    else if (view.dtype == DType::f16)
      view.as<_Float16>()[i] = static_cast<_Float16>(value);
    else if (view.dtype == DType::i8)
      view.as<int8_t>()[i] = static_cast<int8_t>(127 * value);
    else if (view.dtype == DType::bf16)
      view.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    else
      view.as<int32_t>()[i] = static_cast<int32_t>(value);
  }
};

// Deterministic values of about [-1, 1).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  float value() { return static_cast<float>(bits() % 2000) / 1000.f - 1.f; }
  Owned tensor(DType dtype, std::initializer_list<int64_t> shape, float scale = 1.f) {
    Owned t(dtype, shape);
    for (int64_t i = 0; i < t.view.numel(); ++i) t.set(i, scale * value());
    return t;
  }
  Owned bytes(std::initializer_list<int64_t> shape) {
    Owned t(DType::u8, shape);
    for (size_t i = 0; i < t.bytes; ++i) t.view.as<uint8_t>()[i] = static_cast<uint8_t>(bits());
    return t;
  }

 private:
  uint64_t state_;
};

inline Owned ints(std::initializer_list<int32_t> values) {
  Owned t(DType::i32, {static_cast<int64_t>(values.size())});
  int64_t i = 0;
  for (int32_t v : values) t.view.as<int32_t>()[i++] = v;
  return t;
}

// The kernels that run_everywhere has seen: main() compares their number with the table's.
inline std::vector<std::string>& seen_kernels() {
  static std::vector<std::string> names;
  return names;
}

// Runs the call at every ISA level and with 1, 2, 3 and 5 threads. Thread counts must not change
// one bit of `outputs` (which start from their present contents each time); levels may differ by
// `tolerance` (relative to 1 + |value|), in float outputs; a negative one skips that
// comparison. `judge`, if given, sees the outputs of every run.
template <class Args>
void run_everywhere(const char* name, Kernel<Args>* Kernels::* kernel, const Args& args,
                    std::vector<Owned*> outputs, float tolerance,
                    const std::function<void()>& judge = nullptr) {
  seen_kernels().push_back(name);
  const auto snapshot = [&] {
    std::vector<std::vector<char>> all;
    for (Owned* t : outputs) all.emplace_back(t->view.as<char>(), t->view.as<char>() + t->bytes);
    return all;
  };
  const auto start = snapshot();
  std::vector<std::vector<float>> first_level(outputs.size());
  for (const std::string& level : supported_isas()) {
    set_isa(level);
    std::vector<std::vector<char>> alone;
    for (int threads : {1, 2, 3, 5}) {
      set_own_threads(threads);
      for (size_t i = 0; i < outputs.size(); ++i)
        std::copy(start[i].begin(), start[i].end(), outputs[i]->view.as<char>());
      run_call(Call(name, active_kernels().*kernel, args));
      if (judge) judge();
      if (threads == 1) alone = snapshot();
      if (snapshot() != alone) {
        std::fprintf(stderr, "%s at %s: %d threads change the bits\n", name, level.c_str(),
                     threads);
        std::abort();
      }
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Tensor& t = outputs[i]->view;
      const bool is_float =
          t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::f16;
      if (tolerance < 0 || !is_float) continue;
      std::vector<float> values;
      for (int64_t j = 0; j < t.numel(); ++j) values.push_back(outputs[i]->get(j));
      if (first_level[i].empty()) first_level[i] = values;
      for (size_t j = 0; j < values.size(); ++j) {
        const float want = first_level[i][j], got = values[j];
        if (want == got || (std::isnan(want) && std::isnan(got))) continue;  // infinities too
        if (!(std::fabs(got - want) <= tolerance * (1.f + std::fabs(want)))) {
          std::fprintf(stderr, "%s at %s: output %zu[%zu] is %g, the generic level gives %g\n",
                       name, level.c_str(), i, j, got, want);
          std::abort();
        }
      }
    }
  }
}

void test_parallel();
void test_elementwise();
void test_products();
void test_packs();
void test_attention();
void test_attention_backward();
void test_sampling();
void test_training();
void test_losses();
void test_latent();
void test_experts();
void test_moe_gate();
void test_expert_gradients();
void test_quantize();

}  // namespace fastllm::test
