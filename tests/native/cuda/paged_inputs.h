// Inputs of paged attention for the emulated device: tensors that end with their last byte, pages
// in random order, NaN where nobody's keys are.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/tensor.h"
#include "cuda/ptx.cuh"

namespace fastllm::cuda::test {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  float value() { return static_cast<float>(bits() % 20001) / 10000.f - 1.f; }

 private:
  uint64_t state_;
};

// A tensor that the device may read, and write if it is an output.
struct Owned {
  Tensor view;
  std::shared_ptr<char> memory;
  size_t bytes;

  Owned(DType dtype, std::vector<int64_t> shape) {
    const int64_t size = dtype == DType::i8                           ? 1
                         : dtype == DType::f32 || dtype == DType::i32 ? 4
                                                                      : 2;
    view.dtype = dtype;
    view.ndim = static_cast<int>(shape.size());
    int64_t stride = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
      view.shape[i] = shape[static_cast<size_t>(i)];
      view.stride[i] = stride;
      stride *= view.shape[i];
    }
    bytes = static_cast<size_t>(stride * size);
    memory.reset(static_cast<char*>(std::aligned_alloc(64, bytes / 64 * 64 + 64)), std::free);
    std::memset(memory.get(), 0xff, bytes);  // NaN
    view.data = memory.get();
  }
  template <class V>
  V* as() const {
    return view.as<V>();
  }
};

inline uint16_t half_of(DType dtype, float x) {
  return dtype == DType::bf16 ? to_half<Bf16>(x) : to_half<Fp16>(x);
}
inline float float_of(DType dtype, uint16_t bits) {
  return dtype == DType::bf16 ? from_half<Bf16>(bits) : from_half<Fp16>(bits);
}

struct Case {
  DType dtype = DType::bf16;
  bool codes = false;
  int heads = 4, kv_heads = 1, dim = 64, value_dim = 64, page = 64;
  std::vector<int> fresh, cached;  // new tokens and length of each sequence
  int window = -1;
  float softcap = 0;
  bool sinks = false, alias = false;
  int spare_pages = 1;  // columns of the table past the longest sequence
  int rise = 1 << 30;   // keys from here on are four times as large

  std::string name() const {
    std::string s = dtype == DType::bf16 ? "bf16" : "fp16";
    s += codes ? " int8" : alias ? " alias" : "";
    s += " " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " x " +
         std::to_string(dim) + "/" + std::to_string(value_dim) + " page " + std::to_string(page) +
         " window " + std::to_string(window) + " softcap " + std::to_string(softcap) +
         (sinks ? " sinks" : "") + " lengths";
    for (size_t i = 0; i < fresh.size(); ++i)
      s += " " + std::to_string(fresh[i]) + "/" + std::to_string(cached[i]);
    return s;
  }
};

struct Inputs {
  Case c;
  int tokens = 0, width = 0, pages = 0;
  std::unique_ptr<Owned> q, k, v, k_scales, v_scales, sinks, table, starts, lengths;
  std::vector<std::vector<float>> keys, values;  // [sequence][(position, head, dim)], exact
  std::vector<float> queries;

  Tensor given(const std::unique_ptr<Owned>& t) const { return t ? t->view : Tensor{}; }
};

inline int divided(int a, int b) { return (a + b - 1) / b; }

// Pages in a random order; rows past a sequence's end and pages of nobody stay NaN (codes: -1, and
// NaN scales).
inline Inputs make_inputs(const Case& c, uint64_t seed) {
  Inputs in;
  in.c = c;
  Random random(seed);
  Random order(seed + 77);
  const int sequences = static_cast<int>(c.fresh.size());
  for (int n : c.fresh) in.tokens += n;
  for (int n : c.cached) in.width = std::max(in.width, divided(n, c.page));
  in.width += c.spare_pages;
  in.pages = sequences * in.width + 2;
  std::vector<int> pages(static_cast<size_t>(in.pages));
  for (int i = 0; i < in.pages; ++i) pages[static_cast<size_t>(i)] = i;
  for (size_t i = pages.size() - 1; i > 0; --i) std::swap(pages[i], pages[order.bits() % (i + 1)]);

  const DType stored = c.codes ? DType::i8 : c.dtype;
  const int pad = 8;  // q is a slice of rows that are wider
  in.q =
      std::make_unique<Owned>(c.dtype, std::vector<int64_t>{in.tokens, c.heads + 1, c.dim + pad});
  in.q->view.shape[1] = c.heads;
  in.q->view.shape[2] = c.dim;
  in.k = std::make_unique<Owned>(stored, std::vector<int64_t>{in.pages, c.kv_heads, c.page, c.dim});
  in.v = std::make_unique<Owned>(stored,
                                 std::vector<int64_t>{in.pages, c.kv_heads, c.page, c.value_dim});
  const std::vector<int64_t> scale_shape{in.pages, c.kv_heads, c.page};
  if (c.codes) {
    in.k_scales = std::make_unique<Owned>(DType::f32, scale_shape);
    in.v_scales = std::make_unique<Owned>(DType::f32, scale_shape);
  }
  in.table = std::make_unique<Owned>(DType::i32, std::vector<int64_t>{sequences, in.width});
  in.starts = std::make_unique<Owned>(DType::i32, std::vector<int64_t>{sequences + 1});
  in.lengths = std::make_unique<Owned>(DType::i32, std::vector<int64_t>{sequences});
  if (c.sinks) {
    in.sinks = std::make_unique<Owned>(DType::f32, std::vector<int64_t>{c.heads});
    for (int h = 0; h < c.heads; ++h) in.sinks->as<float>()[h] = 3 * random.value();
  }
  in.starts->as<int32_t>()[0] = 0;
  size_t next = 0;
  for (int s = 0; s < sequences; ++s) {
    const size_t at = static_cast<size_t>(s);
    in.starts->as<int32_t>()[s + 1] = in.starts->as<int32_t>()[s] + c.fresh[at];
    in.lengths->as<int32_t>()[s] = c.cached[at];
    for (int i = 0; i < in.width; ++i)
      in.table->as<int32_t>()[s * in.width + i] =
          i < divided(c.cached[at], c.page) ? pages[next++] : 1000000007;
    // Each sequence's numbers depend on its place alone, not on its neighbours.
    Random own(seed + 1000 * static_cast<uint64_t>(c.cached[at]) + 1);
    in.keys.emplace_back();
    in.values.emplace_back();
    for (int position = 0; position < c.cached[at]; ++position)
      for (int h = 0; h < c.kv_heads; ++h) {
        const int64_t page = in.table->as<int32_t>()[s * in.width + position / c.page];
        const int64_t row = (page * c.kv_heads + h) * c.page + position % c.page;
        for (const bool is_value : {false, true}) {
          const int dim = is_value ? c.value_dim : c.dim;
          Owned& cache = is_value ? *in.v : *in.k;
          std::vector<float>& exact = is_value ? in.values.back() : in.keys.back();
          float scale = 1;
          if (c.codes) {
            scale = 0.01f + 0.02f * std::fabs(own.value());
            (is_value ? in.v_scales : in.k_scales)->as<float>()[row] = scale;
          }
          for (int d = 0; d < dim; ++d) {
            if (is_value && c.alias) {
              exact.push_back(in.keys.back()[in.keys.back().size() - static_cast<size_t>(c.dim) +
                                             static_cast<size_t>(d)]);
              continue;
            }
            if (c.codes) {
              const int code = static_cast<int>(own.bits() % 255) - 127;
              cache.as<int8_t>()[row * dim + d] = static_cast<int8_t>(code);
              exact.push_back(static_cast<float>(code));  // its scale is applied by the reference
            } else {
              const float factor = position < c.rise ? 2 : 8;
              const uint16_t bits = half_of(c.dtype, factor * own.value());
              cache.as<uint16_t>()[row * dim + d] = bits;
              exact.push_back(float_of(c.dtype, bits));
            }
          }
        }
      }
    for (int t = in.starts->as<int32_t>()[s]; t < in.starts->as<int32_t>()[s + 1]; ++t)
      for (int h = 0; h < c.heads; ++h)
        for (int d = 0; d < c.dim; ++d) {
          const uint16_t bits = half_of(c.dtype, 2 * own.value());
          in.q->as<uint16_t>()[t * in.q->view.stride[0] + h * in.q->view.stride[1] + d] = bits;
          in.queries.push_back(float_of(c.dtype, bits));
        }
  }
  if (c.alias) {
    in.v->view.data = in.k->view.data;
    for (int i = 0; i < 4; ++i) in.v->view.stride[i] = in.k->view.stride[i];
  }
  return in;
}

}  // namespace fastllm::cuda::test
